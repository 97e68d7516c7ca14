# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""AlignZeg for Transformers. Importing it registers AlignZeg with transformers' Auto classes; no remote code is needed."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor

from .configuration_alignzeg import AlignZegConfig
from .image_processing_alignzeg import AlignZegImageProcessor
from .modeling_alignzeg import AlignZegModel, AlignZegOutput, AlignZegPreTrainedModel
from .pipeline_alignzeg import ZeroShotImageSegmentationPipeline
from .processing_alignzeg import AlignZegProcessor
from .prompts_alignzeg import TEMPLATE_SETS
from .visualization_alignzeg import class_colors, draw_overlay, draw_unseen_map


AutoConfig.register("alignzeg", AlignZegConfig, exist_ok=True)
AutoModel.register(AlignZegConfig, AlignZegModel, exist_ok=True)
AutoModelForSemanticSegmentation.register(AlignZegConfig, AlignZegModel, exist_ok=True)
AutoImageProcessor.register(
    AlignZegConfig,
    image_processor_classes={"pil": AlignZegImageProcessor, "torchvision": AlignZegImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(AlignZegConfig, AlignZegProcessor, exist_ok=True)

__all__ = [
    "TEMPLATE_SETS",
    "AlignZegConfig",
    "AlignZegImageProcessor",
    "AlignZegModel",
    "AlignZegOutput",
    "AlignZegPreTrainedModel",
    "AlignZegProcessor",
    "ZeroShotImageSegmentationPipeline",
    "class_colors",
    "draw_overlay",
    "draw_unseen_map",
]
