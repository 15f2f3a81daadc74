"""Measure the speed of training, and the speed and memory of replay.

- ``learning``: train with every engine, with SB3's DQN and with SBX's
- ``results``: tables of these measurements, and their file
- ``replay``: replay buffers against those of SB3 and cpprb
- ``timing``: time functions in turn
"""
