"""TensorFlow's XLA compiles a layer for a shape, not for the values that come in it.

What must be known when XLA compiles (the limits of a slice, say) is read from the values at hand,
and the program compiled anew for others. One such place downstream of a router makes every batch a
compilation, and no output is wrong.
"""

import re

import keras
import numpy as np
import pytest

from tests import contract
from tests.layers.test_contract import CASES, KINDS

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="JAX traces no values, PyTorch runs eagerly"
)


# A limit that is known with known sizes must be found with unknown ones: those are of all cases.
STATIC = [pytest.param((4, 5), CASES[name], id=f"static-{name}") for name in sorted(KINDS)]
DYNAMIC = [pytest.param((None, None), case, id=f"dynamic-{name}") for name, case in CASES.items()]


@pytest.mark.parametrize(("sizes", "case"), STATIC + DYNAMIC)
def test_no_value_is_compiled_in(sizes, case):
    import tensorflow as tf

    layer = case.make()
    x, mask = contract.tokens(), np.ones((4, 5), bool)
    layer(x)
    weights = [variable.value for variable in layer.trainable_variables]

    def step(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = tf.nest.flatten(layer(x, mask=mask, training=True))
            squares = [tf.reduce_sum(tf.square(tf.cast(y, "float32"))) for y in outputs]
            loss = tf.add_n([*squares, *layer.losses])
        return tape.gradient(loss, [x, *weights])

    signature = [tf.TensorSpec((*sizes, x.shape[-1])), tf.TensorSpec(sizes, "bool")]
    compiled = tf.function(step, input_signature=signature, jit_compile=True)
    inputs = tf.constant(x), tf.constant(mask)
    program = compiled.experimental_get_compiler_ir(*inputs)(stage="hlo")
    entry = re.search(r"^ENTRY .*?^}", program, re.DOTALL | re.MULTILINE)[0]
    arguments = 2 + len(compiled.get_concrete_function().captured_inputs)
    assert len(re.findall(r"\bparameter\(\d+\)", entry)) == arguments
