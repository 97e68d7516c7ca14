# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Transformers' own common tests on AlignZeg's classes, and the list of those that are skipped."""

from __future__ import annotations

import os
import tempfile
import types
import unittest
import unittest.mock
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, picture, tiny_checkpoint, tiny_config, tiny_tokenizer
from transformers import ImageSegmentationPipeline, pipeline

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor, AlignZegModel, AlignZegOutput, AlignZegProcessor


try:
    from transformers_common import SourceUnavailable, load

    modeling, configuration, image_processing, processing, pipelines = map(
        load,
        (
            "test_modeling_common",
            "test_configuration_common",
            "test_image_processing_common",
            "test_processing_common",
            "test_pipeline_mixin",
        ),
    )
except SourceUnavailable as error:
    if os.environ.get("CI"):
        raise
    pytest.skip(str(error), allow_module_level=True)


class AlignZegModelTester:
    """What the common tests ask of a model's tester: a small config and inputs for it."""

    batch_size = 2
    is_training = True
    image_size = 32
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = len(CLASSES)
    seq_length = (32 // 8) ** 2  # tokens of the image encoder

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return tiny_config(unseen_labels=[])

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": modeling.floats_tensor(shape)}


class ImageSegmentationPipelineTests:
    """In place of the checks of that pipeline, which the source distribution leaves out."""

    def get_test_pipeline(
        self, model: AlignZegModel, tokenizer: None, image_processor: AlignZegImageProcessor, dtype: str = "float32"
    ) -> tuple[ImageSegmentationPipeline, list]:
        segmenter = pipeline(
            "image-segmentation", model=model.to(getattr(torch, dtype)), image_processor=image_processor, dtype=dtype
        )
        return segmenter, [picture(0), picture(1)]

    def run_pipeline_test(self, segmenter: ImageSegmentationPipeline, examples: list) -> None:
        for image, segments in zip(examples, segmenter(examples)):
            assert segments and {segment["label"] for segment in segments} <= set(CLASSES)
            assert all(segment["mask"].size == image.size and segment["mask"].mode == "L" for segment in segments)
            covered = sum(
                (torch.frombuffer(segment["mask"].tobytes(), dtype=torch.uint8) > 0).int() for segment in segments
            )
            assert covered.eq(1).all()  # semantic: each pixel has one label


class AlignZegModelTest(modeling.ModelTesterMixin, pipelines.PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (AlignZegModel,)
    _is_composite = True
    pipeline_model_mapping = {"image-segmentation": AlignZegModel}

    @classmethod
    def setUpClass(cls) -> None:
        """Puts a tiny checkpoint where the pipeline tests look for one on the Hub."""
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        tiny_checkpoint(Path(folder.name) / AlignZegConfig.model_type / AlignZegModel.__name__)
        summary = {"tokenizer_classes": [], "processor_classes": [AlignZegImageProcessor.__name__]}
        test = {"image-segmentation": {"test": f"{__name__}.{ImageSegmentationPipelineTests.__name__}"}}
        for name, value in {
            "TRANSFORMERS_TINY_MODEL_PATH": folder.name,
            "tiny_model_summary": {AlignZegModel.__name__: summary},
            "transformers_module": types.SimpleNamespace(AlignZegImageProcessor=AlignZegImageProcessor),
            "pipeline_test_mapping": {**pipelines.pipeline_test_mapping, **test},
        }.items():
            cls.enterClassContext(unittest.mock.patch.object(pipelines, name, value))

    def setUp(self):
        self.model_tester = AlignZegModelTester(self)
        self.config_tester = configuration.ConfigTester(self, config_class=AlignZegConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            shape = (AlignZegModelTester.num_labels, AlignZegModelTester.image_size, AlignZegModelTester.image_size)
            generator = torch.Generator().manual_seed(0)
            inputs["mask_labels"] = [
                (torch.rand(shape, generator=generator) > 0.5).float() for _ in inputs["pixel_values"]
            ]
            inputs["class_labels"] = [torch.arange(shape[0]) for _ in inputs["pixel_values"]]
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):  # the common test wants a table of tokens; EoMT and Mask2Former skip it
        model = AlignZegModel(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), torch.nn.Conv2d)
        new = torch.nn.Conv2d(3, 16, 8, 4, 2)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new is model.stem.convolutions[0]
        assert model.get_output_embeddings() is None

    @unittest.skip("the vocabulary of the text tower is CLIP's")
    def test_resize_tokens_embeddings(self):  # skipped by EoMT and Mask2Former too
        pass


class AlignZegImageProcessingTester(image_processing.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 32, "longest_edge": 320})
        kwargs.setdefault("size_divisor", 1)
        kwargs.setdefault("ignore_index", 255)
        self.num_labels = 5
        super().__init__(parent, batch_size=3, max_resolution=80, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": AlignZegImageProcessor, "torchvision": AlignZegImageProcessor}

    def prepare_post_process_semantic_segmentation_inputs(self):
        outputs = AlignZegOutput(
            masks_queries_logits=torch.randn(self.batch_size, 7, 8, 12),
            class_queries_logits=torch.randn(self.batch_size, 7, self.num_labels + 1),
        )
        return {"outputs": outputs}, {"num_labels": self.num_labels, "height": 8, "width": 12}


class AlignZegImageProcessingTest(
    image_processing.ImageProcessingTestMixin,
    image_processing.PostProcessSemanticSegmentationTestMixin,
    unittest.TestCase,
):
    image_processor_tester_class = AlignZegImageProcessingTester


class AlignZegProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = AlignZegProcessor

    @staticmethod
    def prepare_processor_dict():
        return {"template_set": ["{}"]}  # the names as they are, so that they can be compared with the tokenizer's

    def prepare_text_inputs(self, batch_size=None, modalities=None):
        """Class names; no two of them are equal."""
        names = ["lower newer", "upper older longer string", *(f"lower newer {i}" for i in range(2, batch_size or 0))]
        return names[0] if batch_size is None else names[:batch_size]

    @classmethod
    def _setup_image_processor(cls):
        return AlignZegImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, size_divisor=16)

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()
