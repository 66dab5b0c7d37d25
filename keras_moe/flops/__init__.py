"""What a model costs: the FLOPs and parameters that are active for an example."""

from keras_moe.flops.active_flops import active_flops
from keras_moe.flops.active_parameters import active_parameters
from keras_moe.flops.layer_flops import count_products, layer_flops

__all__ = ["active_flops", "active_parameters", "count_products", "layer_flops"]
