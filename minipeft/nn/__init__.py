"""The parts of models: weights in slots, sites in the stream, layers, attention, blocks.

Nothing here knows of any method: a model offers places (slots and sites), and does not know what is plugged there.
"""
