"""Float64 NumPy oracles: every layer once more, from the equations alone.

They loop over tokens and experts, know nothing of `keras_moe`, and carry hand-written backward
passes, which `test_oracle.py` holds against central differences. Weights are dicts named as the
layers name them (`router/kernel`, `experts/kernel_0`, ...), and so are gradients, which add
`inputs`.
"""
