"""TheWorld as transformers sees it: config, model and processor, registered with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.model.processing import TheWorldProcessor

#: Short name of the model class.
TheWorld = TheWorldForConditionalGeneration

AutoConfig.register("theworld", TheWorldConfig)
AutoModelForImageTextToText.register(TheWorldConfig, TheWorldForConditionalGeneration)
AutoProcessor.register(TheWorldConfig, TheWorldProcessor)
# Checkpoints of Gemma 3 on the hub carry older parameter names, which transformers renames by model type.
register_checkpoint_conversion_mapping("theworld", get_checkpoint_conversion_mapping("gemma3") or [], overwrite=True)

__all__ = ["TheWorld", "TheWorldConfig", "TheWorldForConditionalGeneration", "TheWorldProcessor"]
