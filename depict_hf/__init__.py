"""DEPICT, the white-box decoder for semantic segmentation, for the Hugging Face ecosystem.

Importing the package registers its classes with `AutoConfig`, `AutoModelForSemanticSegmentation` and
`AutoImageProcessor`, and marks them to travel with saved models, which then load with `trust_remote_code=True`
elsewhere.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation

from .configuration_depict import DepictConfig
from .image_processing_depict import DepictImageProcessor
from .modeling_depict import DepictForSemanticSegmentation

__all__ = ["DepictConfig", "DepictForSemanticSegmentation", "DepictImageProcessor"]

AutoConfig.register("depict", DepictConfig)
AutoModelForSemanticSegmentation.register(DepictConfig, DepictForSemanticSegmentation)
AutoImageProcessor.register(DepictConfig, image_processor_classes={"torchvision": DepictImageProcessor})

DepictConfig.register_for_auto_class()
DepictForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
DepictImageProcessor.register_for_auto_class()
