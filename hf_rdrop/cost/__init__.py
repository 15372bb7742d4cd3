"""What a step with R-Drop costs beside a plain one: `model_shape` reads the sizes, `predict` does the sums."""

from .model_shape import LayerStack, ModelShape, decoder_shape, describe_model
from .predict import MACHINES, Machine, Step, StepCost, peak_memory, predict_cost, step_flops
