"""From observations to outputs ``(B, A, K)``: features, trunk, dueling streams, noisy layers; and the policies."""
