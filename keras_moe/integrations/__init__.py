"""Bridges from Keras 3 to libraries that still run on Keras 2.

Importing this package imports nothing else: each bridge is a module of its own that asks for its
packages when it is imported, as in `from keras_moe.integrations.tfrs import KerasBridge`.
"""
