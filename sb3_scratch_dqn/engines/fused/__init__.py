"""Updates on the CPU in few calls.

- ``engine``: gradients by hand, for networks of linear layers
- ``dense``: the mathematics of the layers; ``products``: the fastest matrix products
- ``learners``: the mathematics of the losses
- ``flat``: parameters, gradients and Adam's state in one piece
- ``support``: which networks can be served by hand
- ``autograd``: the engine for all other networks
"""
