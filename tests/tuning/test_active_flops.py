"""FLOPs by hand, against what the backends count, and that counting changes nothing."""

import threading

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import layers, routers
from keras_moe.flops.active_flops import active_flops
from keras_moe.flops.layer_flops import count_products, layer_flops

on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads jaxprs")
on_torch = pytest.mark.skipif(keras.backend.backend() != "torch", reason="counts torch's calls")
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="elsewhere every size of a call is known"
)

N, D, H, E = 6, 4, 10, 5  # tokens, model width, hidden width, experts


@pytest.fixture(autouse=True)
def _weights_that_cost_nothing(monkeypatch):
    """JAX compiles an initializer for every new shape; no figure here depends on a weight."""
    add_weight = keras.layers.Layer.add_weight

    def add_drawn(layer, shape=None, initializer=None, **kwargs):
        def drawn(shape, dtype=None):
            return rng.uniform(0.1, 1.0, shape).astype(dtype)

        is_count = not kwargs.get("trainable", True)
        return add_weight(layer, shape, initializer if is_count else drawn, **kwargs)

    rng = np.random.default_rng(0)
    monkeypatch.setattr(keras.layers.Layer, "add_weight", add_drawn)


class Block(keras.layers.Layer):
    """A user's own block, with products of its own."""

    def __init__(self, feed_forward, num_heads=2, key_dim=3):
        super().__init__()
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.attention = keras.layers.MultiHeadAttention(num_heads, key_dim)
        self.feed_forward = feed_forward

    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1], shape[-1]), name="gain")
        for norm in self.norms:
            norm.build(shape)
        self.attention.build(shape, shape)
        self.feed_forward.build(shape)

    def call(self, x):
        normed = self.norms[0](x)
        x = ops.matmul(x, self.gain) + self.attention(normed, normed)
        return x + self.feed_forward(self.norms[1](x))

    def compute_output_shape(self, shape):
        return shape


class SigmoidRouter(routers.LinearRouter):
    """A custom rule with a hidden layer in front of the scores."""

    def build(self, shape):
        super().build(shape)
        self.hidden = keras.layers.Dense(shape[-1])
        self.hidden.build(shape)

    def call(self, inputs, mask=None, training=None):
        return super().call(self.hidden(inputs), mask=mask, training=training)

    def choose(self, logits, probabilities):
        experts = ops.cast(ops.argsort(-logits, axis=-1)[:, : self.top_k], "int32")
        return experts, ops.take_along_axis(probabilities, experts, axis=-1)


class LookedUp(keras.layers.Layer):
    """A matrix and no product."""

    def build(self, shape):
        self.table = self.add_weight(shape=(7, shape[-1]), name="table")

    def call(self, x):
        return x + self.table[0]


class LoopedDense(keras.layers.Layer):
    """A product in a loop."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")

    def call(self, x):
        return ops.fori_loop(0, 3, lambda _, value: ops.matmul(value, self.kernel), x)


def dense_experts(*units):
    return [
        keras.Sequential([keras.layers.Dense(u, activation="relu"), keras.layers.Dense(D)])
        for u in units
    ]


MLP = 2 * (D * H + H * D)  # of one token in one expert
ROUTER = 2 * D * E
CASES = {
    "dense": (lambda: keras.layers.Dense(7), (D,), 2 * D * 7),
    "dense on a sequence": (lambda: keras.layers.Dense(7), (N, D), N * 2 * D * 7),
    "einsum dense": (
        lambda: keras.layers.EinsumDense("abc,cde->abde", (None, 3, 5)),
        (N, D),
        2 * N * D * 3 * 5,
    ),
    "einsum dense, dots": (
        lambda: keras.layers.EinsumDense("...x,xy->...y", 7),
        (2, N, D),
        2 * 2 * N * D * 7,
    ),
    "conv1d": (lambda: keras.layers.Conv1D(8, 3, dilation_rate=2), (9, D), 2 * 5 * 8 * 3 * D),
    "conv2d, strides, groups": (
        lambda: keras.layers.Conv2D(8, 3, strides=2, groups=2),
        (9, 7, 4),
        2 * (4 * 3) * 8 * (3 * 3 * 4 // 2),
    ),
    "conv2d, same": (
        lambda: keras.layers.Conv2D(8, 3, padding="same"),
        (5, 5, 4),
        2 * (5 * 5) * 8 * (3 * 3 * 4),
    ),
    "conv3d": (lambda: keras.layers.Conv3D(2, 2), (4, 4, 4, 3), 2 * 3**3 * 2 * (2**3 * 3)),
    "depthwise conv": (
        lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2),
        (5, 5, 4),
        2 * 3**2 * (4 * 2) * 3**2,
    ),
    "separable conv": (
        lambda: keras.layers.SeparableConv2D(8, 3, strides=2, depth_multiplier=2),
        (5, 5, 4),
        2 * 2**2 * ((4 * 2) * 3**2 + 4 * 2 * 8),
    ),
    "transposed conv": (
        lambda: keras.layers.Conv2DTranspose(8, 3, strides=2),
        (5, 5, 4),
        2 * 5**2 * 4 * 3**2 * 8,
    ),
    "lstm": (lambda: keras.layers.LSTM(H), (N, D), N * 2 * (D + H) * 4 * H),
    "both ways": (
        lambda: keras.layers.Bidirectional(keras.layers.GRU(H)),
        (N, D),
        2 * N * 2 * (D + H) * 3 * H,
    ),
    "each step": (
        lambda: keras.layers.TimeDistributed(layers.MoE(E, H, top_k=2)),
        (N, D),
        N * (ROUTER + 2 * MLP),
    ),
    "weightless": (keras.layers.Flatten, (N, D), 0),
    "norms": (
        lambda: keras.Sequential(
            [
                keras.layers.LayerNormalization(axis=(-2, -1)),
                keras.layers.BatchNormalization(),
                keras.layers.PReLU(),
            ]
        ),
        (N, D),
        0,
    ),
    "moe": (lambda: layers.MoE(E, H, top_k=2), (N, D), N * (ROUTER + 2 * MLP)),
    "moe, whole image": (lambda: layers.MoE(E, H), (2, 3, D), 6 * (ROUTER + 2 * MLP)),
    "moe, all chosen": (lambda: layers.MoE(E, H, top_k=E), (N, D), N * (ROUTER + E * MLP)),
    "moe, dense router": (
        lambda: layers.MoE(E, H, router="dense"),
        (N, D),
        N * (ROUTER + E * MLP),
    ),
    "moe, switch router": (
        lambda: layers.MoE(E, H, router="switch"),
        (N, D),
        N * (ROUTER + MLP),
    ),
    "moe, capacity": (
        lambda: layers.MoE(E, H, capacity_factor=3.0),
        (N, D),
        N * (ROUTER + 2 * MLP),
    ),
    "moe, all carried": (
        lambda: layers.MoE(E, H, dispatch="dense"),
        (N, D),
        N * (ROUTER + 2 * MLP),
    ),
    "moe, per example": (
        lambda: layers.MoE(E, H, routing_level="example"),
        (N, D),
        ROUTER + N * 2 * MLP,
    ),
    "moe, shared experts": (
        lambda: layers.MoE(E, H, num_shared_experts=3),
        (N, D),
        N * (ROUTER + (2 + 3) * MLP),
    ),
    "moe, glu, output": (
        lambda: layers.MoE(E, H, experts="glu", output_dim=7, num_shared_experts=1),
        (N, D),
        N * (ROUTER + (2 + 1) * 2 * (2 * D * H + H * 7)),
    ),
    "moe, custom router": (
        lambda: layers.MoE(E, H, router=SigmoidRouter(E, top_k=3)),
        (N, D),
        N * (2 * D * D + ROUTER + 3 * MLP),
    ),
    "moe, deep bank": (
        lambda: layers.MoE(E, experts=layers.ExpertMLP(E, (H, 3, D))),
        (N, D),
        N * (ROUTER + 2 * 2 * (D * H + H * 3 + 3 * D)),
    ),
    "moe, layers": (
        lambda: layers.MoE(3, top_k=2, experts=dense_experts(5, 5, 5)),
        (N, D),
        N * (2 * D * 3 + 2 * 2 * (D * 5 + 5 * D)),
    ),
    "moe, unequal layers": (  # N * 2/3 of experts of 1, 2 and 4 hidden units
        lambda: layers.MoE(3, top_k=2, experts=dense_experts(1, 2, 4)),
        (N, D),
        N * 2 * D * 3 + N * 2 * (2 * D) * (1 + 2 + 4) * 2 // 3,
    ),
    "switch": (lambda: layers.SwitchFFN(E, H), (N, D), N * (ROUTER + MLP)),
    "soft moe": (
        lambda: layers.SoftMoE(E, H, slots_per_expert=3),
        (N, D),
        2 * N * D * 15 + 2 * 15 * N * D + 15 * MLP + 2 * N * 15 * D,
    ),
    "soft moe, output": (
        lambda: layers.SoftMoE(E, H, output_dim=7),
        (N, D),
        2 * N * D * E + 2 * E * N * D + E * 2 * (D * H + H * 7) + 2 * N * E * 7,
    ),
    "soft moe, causal": (  # every token has its own slots
        lambda: layers.SoftMoE(E, H, causal=True),
        (N, D),
        2 * N * D * E + N * (2 * E * N * D + E * MLP) + N * 2 * E * D,
    ),
    "mmoe": (
        lambda: layers.MMoE(E, [H, 7], tasks=3),
        (D,),
        E * 2 * (D * H + H * 7) + 3 * 2 * D * E + 3 * 2 * E * 7,
    ),
    "mmoe on a sequence": (
        lambda: layers.MMoE(E, H, tasks=["a", "b"]),
        (N, D),
        N * (E * 2 * D * H + 2 * 2 * D * E + 2 * 2 * E * H),
    ),
    "mmoe, gate units": (
        lambda: layers.MMoE(E, H, tasks=3, gate_units=[8, 6]),
        (D,),
        E * 2 * D * H + 3 * 2 * (D * 8 + 8 * 6 + 6 * E) + 3 * 2 * E * H,
    ),
}
ATTENTION = 2 * N * D * 3 * (2 * 3) + 2 * N * (2 * 3) * D + 2 * 2 * N * N * (3 + 3)


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case):
    make, shape, expected = CASES[case]
    layer = make()
    layer.build((None, *shape))
    assert active_flops(layer, shape) == expected


def test_attention_by_hand():
    """Projections of 2 heads of width 3, of 5 for values; queries against N keys, and N values."""
    query, value = keras.Input((7, D)), keras.Input((N, D))
    attention = keras.layers.MultiHeadAttention(2, 3, value_dim=5, dropout=0.1)
    model = keras.Model([query, value], attention(query, value))
    projections = 7 * D * 2 * 3 + N * D * 2 * 3 + N * D * 2 * 5 + 7 * 2 * 5 * D
    assert active_flops(model) == 2 * projections + 2 * 2 * 7 * N * (3 + 5)


def test_attention_with_scores_and_dropout_counts_the_same():
    x = keras.Input((N, D))
    plain = keras.layers.MultiHeadAttention(2, 3)(x, x)
    scored, _ = keras.layers.MultiHeadAttention(2, 3, dropout=0.1)(
        x, x, return_attention_scores=True, use_causal_mask=True
    )
    assert active_flops(keras.Model(x, plain)) == ATTENTION
    assert active_flops(keras.Model(x, scored)) == ATTENTION


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x: x @ ops.transpose(x, (0, 2, 1)), 2 * N * N * D),
        (lambda x: ops.einsum("bnd,bmd->bnm", x, x), 2 * N * N * D),
        (lambda x: ops.einsum("bnd,bne", x, x), 2 * N * D * D),
        (lambda x: ops.einsum("...nd,...md->...nm", x, ops.ones((1, 3, D))), 2 * N * 3 * D),
        (lambda x: ops.einsum("bnd,bmd,bme->bne", x, x, x), 2 * (N * N * D) + 2 * (N * N * D)),
        (lambda x: ops.einsum("bnd,bnd->bnd", x, x), 0),
        (lambda x: ops.einsum("bnd->bd", x), 0),
        (lambda x: ops.tensordot(x, ops.ones((D, 7)), axes=1), 2 * N * D * 7),
        (lambda x: ops.tensordot(x, ops.ones((N, D, 7)), axes=2), 2 * N * D * 7),
        (lambda x: ops.dot(x, ops.ones((D, 7))), 2 * N * D * 7),
        (lambda x: ops.dot(x, ops.ones(())), 0),
        (lambda x: ops.matmul(x, ops.ones((D,))), 2 * N * D),
        (lambda x: ops.sum(ops.exp(x) * 2, axis=1) + 1, 0),
    ],
)
def test_operations_of_a_functional_model(operation, expected):
    x = keras.Input((N, D))
    assert active_flops(keras.Model(x, operation(x))) == expected


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX wants equal widths")
def test_fused_attention_with_wider_values():
    def heads(count, width):
        return ops.ones((1, count, 2, width))

    x = keras.Input((7, 2, 3))
    y = ops.dot_product_attention(x, heads(N, 3), heads(N, 5))
    assert active_flops(keras.Model(x, y)) == 2 * 2 * 7 * N * (3 + 5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_dtype_does_not_matter(policy):
    layer = layers.MoE(E, H, num_shared_experts=1, dtype=policy)
    layer.build((None, N, D))
    assert active_flops(layer, (N, D)) == N * (ROUTER + 3 * MLP)


def test_hidden_of_k_experts_equals_one_wide_feed_forward():
    moe = layers.MoE(E, H, top_k=3)
    moe.build((None, N, D))
    wide = keras.Sequential([keras.layers.Dense(3 * H), keras.layers.Dense(D)])
    wide.build((None, N, D))
    assert active_flops(moe, (N, D)) - N * ROUTER == active_flops(wide, (N, D))


@settings(deadline=None, max_examples=3, derandomize=True)
@given(data=st.data(), num_experts=st.integers(1, 7), width=st.integers(1, 9))
def test_k_of_e_experts_are_their_share_of_all(data, num_experts, width):
    top_k = data.draw(st.integers(1, num_experts))
    hidden, tokens = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    sparse = layers.MoE(num_experts, hidden, top_k=top_k)
    dense = layers.MoE(num_experts, hidden, router="dense")
    for layer in (sparse, dense):
        layer.build((None, tokens, width))
    router = 2 * tokens * width * num_experts
    of_k, of_all = (active_flops(layer, (tokens, width)) - router for layer in (sparse, dense))
    assert of_k * num_experts == of_all * top_k
    assert of_k == 2 * 2 * tokens * top_k * width * hidden


# === Models ===

BLOCK = 2 * N * D * D + ATTENTION


def test_own_block_around_our_layers():
    x = keras.Input((N, D))
    soft, sparse = Block(layers.SoftMoE(E, H)), Block(layers.MoE(E, H))
    model = keras.Model(x, keras.layers.Dense(3)(sparse(soft(x))))
    soft_moe = 3 * 2 * N * D * E + E * MLP
    assert active_flops(model) == 2 * BLOCK + soft_moe + N * (ROUTER + 2 * MLP) + 2 * N * D * 3


def test_a_layer_called_twice_counts_twice_and_nested_models_too():
    dense = keras.layers.Dense(D)
    inner = keras.Sequential([keras.Input((D,)), dense, keras.layers.Dense(7)])
    x = keras.Input((D,))
    model = keras.Model(x, inner(dense(dense(x))))
    assert active_flops(model) == 3 * 2 * D * D + 2 * D * 7


def test_inputs_by_name():
    inputs = {
        "user": keras.Input((), dtype="int32", name="user"),
        "history": keras.Input((None,), dtype="int32", name="history"),
        "features": keras.Input((3,), name="features"),
    }
    embedding = keras.layers.Embedding(9, D)
    history = layers.MoE(E, H)(embedding(inputs["history"]))
    joined = keras.layers.Concatenate()(
        [embedding(inputs["user"]), ops.mean(history, axis=1), inputs["features"]]
    )
    tasks = layers.MMoE(2, 6, tasks=["click", "like"])(joined)
    model = keras.Model(inputs, {task: keras.layers.Dense(1)(y) for task, y in tasks.items()})
    d = D + D + 3
    expected = N * (ROUTER + 2 * MLP) + 2 * (2 * d * 6) + 2 * (2 * d * 2 + 2 * 2 * 6 + 2 * 6)
    assert active_flops(model, {"user": (), "history": (N,), "features": (3,)}) == expected
    with pytest.raises(
        ValueError, match=r".*`input_shape` must give every size.* Received: input_shape=No"
    ):
        active_flops(model)
    with pytest.raises(ValueError, match="`input_shape` must have the structure of the model's"):
        active_flops(model, (N,))
    with pytest.raises(ValueError, match="`input_shape` must give every size"):
        active_flops(model, {"user": (), "history": (None,), "features": (3,)})


def test_a_list_of_inputs():
    a, b = keras.Input((D,)), keras.Input((None, D))
    model = keras.Model([a, b], ops.matmul(b, ops.expand_dims(keras.layers.Dense(D)(a), -1)))
    assert active_flops(model, [(D,), (N, D)]) == 2 * D * D + 2 * N * D


def test_a_batch_size_that_the_model_fixes_is_divided_out():
    x = keras.Input(batch_shape=(3, N, D))
    model = keras.Model(x, layers.MoE(E, H)(x))
    assert active_flops(model) == active_flops(model, (N, D)) == N * (ROUTER + 2 * MLP)


def test_a_subclassed_model():
    class Ranker(keras.Model):
        def __init__(self):
            super().__init__()
            self.block, self.head = Block(layers.SwitchFFN(E, H)), keras.layers.Dense(2)

        def build(self, shape):
            self.block.build(shape)
            self.head.build(shape)

        def call(self, inputs):
            return self.head(self.block(inputs["tokens"]))

    model = Ranker()
    model.build((None, N, D))
    expected = BLOCK + N * (ROUTER + MLP) + 2 * N * D * 2
    assert active_flops(model, {"tokens": (N, D)}) == expected
    with pytest.raises(ValueError, match="`input_shape` must give every size"):
        active_flops(model)


def test_a_sequential_model_without_input():
    model = keras.Sequential([layers.MoE(E, H), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="`model` must be built: call it once"):
        active_flops(model, (N, D))
    model.build((None, N, D))
    assert active_flops(model) == N * (ROUTER + 2 * MLP + 2 * D * 2)


def test_masks_go_on_behind_a_layer_that_has_a_rule():
    class MaskedMean(keras.layers.Layer):
        supports_masking = True

        def compute_mask(self, x, mask):
            return None

        def call(self, x, mask=None):
            weights = ops.expand_dims(ops.cast(mask, x.dtype), -1)  # fails without a mask
            return ops.sum(x * weights, axis=1)

    class Text(keras.Model):  # a functional model has the masks in its graph
        def __init__(self):
            super().__init__()
            self.embedding = keras.layers.Embedding(9, D, mask_zero=True)
            self.first, self.second = layers.MoE(E, H), layers.MoE(E, H)
            self.mean = MaskedMean()

        def build(self, shape):
            for layer in (self.embedding, self.first, self.second, self.mean):
                layer.build((*shape, D))

        def call(self, x):
            y, routing = self.second(inputs=self.first(self.embedding(x)), return_routing=True)
            return self.mean(y), routing.logits

    model = Text()
    model.build((None, N))
    assert active_flops(model, (N,)) == 2 * N * (ROUTER + 2 * MLP)


# === Rules ===


def test_a_matrix_without_product_is_refused_by_name():
    layer = LookedUp(name="positions")
    model = keras.Sequential([keras.Input((N, D)), keras.layers.Dense(D), layer])
    message = (
        r"`positions` \(LookedUp\) has a matrix and asks no product .* not known. Register a rule: "
        r"`@layer_flops.register` .*`layer_flops.register\(LookedUp, count_products\)`. "
        r"Received: table=\(7, 4\)"
    )
    with pytest.raises(ValueError, match=message):
        active_flops(model)
    with pytest.raises(ValueError, match=message):
        active_flops(layer, (N, D))
    # Layers around it have products, and are no excuse for it.
    moe = layers.MoE(2, experts=[LookedUp(name="positions"), LookedUp()])
    with pytest.raises(ValueError, match=r"`positions` \(LookedUp\) has a matrix"):
        moe.build((None, N, D))
        active_flops(moe, (N, D))


def test_a_vector_or_a_class_token_is_no_matrix():
    class Scaled(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(1, 1, shape[-1]))

        def call(self, x):
            return x * self.scale

    model = keras.Sequential([keras.Input((N, D)), Scaled()])
    assert active_flops(model) == 0


def test_registered_rules_hold_for_subclasses():
    class Table(LookedUp):
        pass

    class BigTable(Table):
        pass

    class Foreign(LookedUp):
        pass

    class ForeignBlock(Foreign):
        def build(self, shape):
            super().build(shape)
            self.inner = keras.layers.Dense(D)
            self.inner.build(shape)

        def call(self, x):
            return super().call(self.inner(x))

    layer_flops.register(Table, count_products)

    @layer_flops.register
    def _(layer: Foreign, inputs, **arguments):
        inner = layer_flops(layer.inner, inputs) if isinstance(layer, ForeignBlock) else 0
        return inner + 1000 * inputs.shape[1] + layer.table.shape[0]

    x = keras.Input((N, D))
    assert active_flops(keras.Model(x, BigTable()(Table()(x)))) == 0
    assert active_flops(keras.Model(x, Foreign()(x))) == 1000 * N + 7
    assert active_flops(keras.Model(x, ForeignBlock()(x))) == 2 * N * D * D + 1000 * N + 7


def test_an_error_of_a_rule_arrives_as_it_is():
    class Odd(LookedUp):
        pass

    @layer_flops.register
    def _(layer: Odd, inputs, **arguments):
        raise RuntimeError("no idea")

    x = keras.Input((N, D))
    with pytest.raises(RuntimeError, match=r"^no idea$"):
        active_flops(keras.Model(x, Odd()(x)))


def test_a_product_in_a_loop_is_refused():
    layer = LoopedDense(name="looped")
    layer.build((None, D))
    with pytest.raises(ValueError, match=r"`looped` .* inside of `keras.ops.fori_loop`"):
        active_flops(layer, (D,))


def test_an_unbuilt_layer_inside_is_named():
    class Lazy(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(D, name="inside")

        def build(self, shape):
            pass

        def call(self, x):
            return self.inner(x)

        def compute_output_shape(self, shape):
            return shape

    x = keras.Input((D,))
    layer = Lazy()
    model = keras.Model(x, layer(x))
    with pytest.raises(ValueError, match=r"`inside` \(Dense\) must be built: call the model once"):
        active_flops(model)
    assert layer.inner.weights == []
    model(np.zeros((1, D), "float32"))
    assert active_flops(model) == 2 * D * D


@on_tensorflow
def test_a_product_of_unknown_size_is_refused():
    class Filtered(keras.layers.Layer):
        def call(self, x):
            import tensorflow as tf

            return ops.matmul(tf.boolean_mask(x, x[:, 0] > 0), ops.ones((D, 3)))

    with pytest.raises(ValueError, match=r"`filtered` .* has a product of unknown size"):
        layer = Filtered()
        layer.build((None, D))
        active_flops(layer, (D,))


# === Nothing changes ===


def test_the_model_is_left_as_it_was():
    x = keras.Input((N, D))
    y = layers.MoE(E, H, router="dense", dropout=0.2, seed=1, name="moe")(x)
    model = keras.Model(x, keras.layers.BatchNormalization()(keras.layers.Dropout(0.5, seed=2)(y)))
    model.compile("sgd", "mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(8, N, D)).astype("float32")
    model.fit(x, x, verbose=0)
    state = [ops.convert_to_numpy(v) for v in model.variables]
    counts = model.get_layer("moe").running_counts()
    losses = [id(loss) for loss in model.losses]

    assert active_flops(model) == active_flops(model)

    assert [id(loss) for loss in model.losses] == losses
    for variable, value in zip(model.variables, state, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    for name, value in model.get_layer("moe").running_counts().items():
        np.testing.assert_array_equal(value, counts[name])
    model.fit(x, x, verbose=0)
    assert all(np.isfinite(ops.convert_to_numpy(v)).all() for v in model.variables)
    assert model.get_layer("moe").running_counts()["decisions"] == 2 * 8 * N


def test_names_of_later_layers_are_not_used_up():
    model = keras.Sequential([keras.Input((N, D)), layers.MoE(E, H), keras.layers.LSTM(3)])
    first = int(keras.layers.Layer().name.removeprefix("layer").strip("_") or 0)
    active_flops(model)
    assert int(keras.layers.Layer().name.removeprefix("layer").strip("_")) == first + 1


def test_hooks_are_taken_off_also_after_an_error():
    call, matmul = keras.layers.Layer.__call__, keras.src.backend.numpy.matmul
    layer = LookedUp()
    layer.build((None, D))
    with pytest.raises(ValueError, match="has a matrix"):
        active_flops(layer, (D,))
    assert keras.layers.Layer.__call__ is call
    assert keras.src.backend.numpy.matmul is matmul


def test_other_threads_are_not_counted():
    class Busy(keras.layers.Layer):
        def call(self, x):
            other = threading.Thread(target=lambda: np.asarray(ops.matmul(*[np.eye(3)] * 2)))
            other.start()
            other.join()
            return x

    assert active_flops(keras.Sequential([keras.Input((D,)), Busy()])) == 0


@on_torch
def test_a_call_that_cannot_run_on_shapes_alone_counts_once():
    class Concrete(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 3))

        def call(self, x):
            y = ops.matmul(x, self.kernel)
            return y * float(y.cpu().sum().item())  # a meta tensor has no item

    model = keras.Sequential([keras.Input((N, D)), Concrete()])
    assert active_flops(model) == 2 * N * D * 3


# === What the backends count ===

WIDTH, TOKENS = 64, 32
COMPARED = {
    "dense block": lambda: Block(
        keras.Sequential([keras.layers.Dense(256, "relu"), keras.layers.Dense(WIDTH)]), 4, 16
    ),
    "dense router": lambda: layers.MoE(4, 128, router="dense", activation="relu"),
    # Rows of the experts, 8 * ceil(2 * 32 * batch / 8), are k per token.
    "capacity 1": lambda: layers.MoE(8, 128, capacity_factor=1.0, activation="relu"),
    "shared glu": lambda: layers.MoE(
        8, 128, experts="glu", num_shared_experts=1, capacity_factor=1.0, activation="relu"
    ),
    "switch": lambda: layers.SwitchFFN(8, 128, capacity_factor=1.0, eval_capacity_factor=1.0),
    "soft": lambda: layers.SoftMoE(16, 128, slots_per_expert=2, activation="relu"),
    "soft, causal": lambda: layers.SoftMoE(8, 64, causal=True, activation="relu"),
    "mmoe": lambda: layers.MMoE(8, [128, 64], tasks=2, gate_units=[32]),
    "conv": lambda: keras.layers.Conv1D(32, 3, strides=2, groups=4),
}
BATCH = 4


def make_compared(name):
    x = keras.Input((TOKENS, WIDTH))
    return keras.Model(x, COMPARED[name]()(x)), np.zeros((BATCH, TOKENS, WIDTH), "float32")


def products_of(jaxpr):
    """FLOPs of all `dot_general` and convolutions of a jaxpr."""
    flops = 0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars]
        output = int(np.prod(equation.outvars[0].aval.shape))
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            flops += 2 * output * int(np.prod([shapes[0][axis] for axis in contracted]))
        elif name == "conv_general_dilated":
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            flops += 2 * output * int(np.prod(shapes[1])) // shapes[1][out_axis]
        else:
            nested = [equation.params.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr")]
            flops += sum(products_of(getattr(j, "jaxpr", j)) for j in nested if j is not None)
    return flops


@on_jax
@pytest.mark.parametrize("name", COMPARED)
def test_equals_the_products_that_jax_traces_and_nearly_all_of_what_xla_counts(name):
    import jax

    model, x = make_compared(name)
    flops = BATCH * active_flops(model)

    def forward(x):
        return model(x, training=False)

    assert products_of(jax.make_jaxpr(forward)(x).jaxpr) == flops
    compiled = jax.jit(forward).lower(x).compile().cost_analysis()["flops"]
    # XLA adds softmax, norms, activations, biases and combining: O(width) beside O(width^2).
    assert flops <= compiled <= 1.03 * flops


@on_torch
@pytest.mark.parametrize("name", COMPARED)
def test_equals_what_torch_counts(name, monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from keras_moe.dispatch import costs

    # In slots, as on a GPU: the counter does not see a walk, which writes its products in place.
    monkeypatch.setitem(costs._WALK_FROM, "torch", float("inf"))
    model, x = make_compared(name)
    x = ops.convert_to_tensor(x)
    # Of the fused kernels of attention the counter knows only those of CUDA.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, training=False)
    assert counter.get_total_flops() == BATCH * active_flops(model)
