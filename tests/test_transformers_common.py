# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Transformers' own common tests on AlignZeg's classes, and the list of skipped ones."""

from __future__ import annotations

import fnmatch
import os
import tempfile
import types
import unittest
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, picture, tiny_checkpoint, tiny_config, tiny_tokenizer
from transformers import ImageSegmentationPipeline, pipeline

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor, AlignZegModel, AlignZegOutput, AlignZegProcessor
from modeling_alignzeg.side_network_alignzeg import AlignZegEncoderLayer


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


# All skipped common tests, as name patterns by reason. [`test_every_skip_is_listed`] compares them with the tests that are
# really skipped. Mask2Former's own test file skips 85 of `ModelTesterMixin` on a machine without accelerator.

# On any machine: the test does not apply to AlignZeg.
DOES_NOT_APPLY = {
    "no text generation, no language model head, no sequence to sequence": [
        "test_causal_lm_loss_honors_shift_labels",
        "test_encoder_decoder_loss_no_double_shift",
    ],
    "no mixture of experts": [
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
        "test_eager_matches_batched_and_grouped_inference_*",
    ],
    "the model is composite, and `test_sdpa_can_dispatch_composite_models` passes": [
        "test_sdpa_can_dispatch_non_composite_models",
    ],
    "no rotary embeddings, no sliding windows": [
        "test_model_rope_*",
        "test_vision_axial_rope",
        "test_sliding_window_mask",
    ],
    "the input is an image; class names are tokens of CLIP's vocabulary, which does not change": [
        "test_inputs_embeds",
        "test_resize_tokens_embeddings",
    ],
    "position embeddings are resampled in every forward pass, there is no method to resize them": [
        "test_resize_position_vector_embeddings",
    ],
    "no plan for tensor parallelism": ["test_tp_plan_matches_params", "test_tied_head_has_a_tp_plan_entry"],
    "another task; the mixin reads image segmentation's tests only": [
        "test_pipeline_any_to_any*",
        "test_pipeline_audio_classification*",
        "test_pipeline_automatic_speech_recognition*",
        "test_pipeline_depth_estimation*",
        "test_pipeline_feature_extraction*",
        "test_pipeline_fill_mask*",
        "test_pipeline_image_classification*",
        "test_pipeline_image_feature_extraction*",
        "test_pipeline_image_text_to_text*",
        "test_pipeline_mask_generation*",
        "test_pipeline_object_detection*",
        "test_pipeline_table_question_answering*",
        "test_pipeline_text_*",
        "test_pipeline_token_classification*",
        "test_pipeline_zero_shot*",
    ],
    "looks at a decorator that image processors on a backend do not have; they check their arguments themselves": [
        "test_image_processor_preprocess_arguments",
    ],
    "no chat templates, no placeholder tokens for images": [
        "test_apply_chat_template_assistant_mask",
        "test_apply_chat_template_*_[0-9]",
        "test_apply_chat_template_tool_calls_no_content",
        "test_apply_chat_template_video_frame_sampling",
        "test_chat_template_jinja_kwargs",
        "test_chat_template_save_loading",
        "test_chat_template_saving_rejects_path_traversal",
        "test_get_num_multimodal_tokens_matches_processor_call*",
        "test_replacement_offsets",
    ],
    "no audio, no video": ["test_*_[0-9]_audio", "test_*_[0-9]_videos"],
}
# Only if hardware or a library is missing; otherwise they run, or are skipped for a reason above.
NOT_ON_EVERY_MACHINE = {
    "an accelerator, or several": [
        "test_can_load_with_device_context_manager",
        "test_can_load_with_global_device_set",
        "test_cpu_offload",
        "test_disk_offload_*",
        "test_flex_attention_with_grads",
        "test_model_parallelism",
        "test_sdpa_can_compile_dynamic",
        "test_sdpa_can_dispatch_on_flash",
        "test_torch_compile_for_training",
        "test_can_compile_torchvision_backend",
    ],
    "flash attention or the kernels library": ["test_flash_attn_*", "test_kernels_can_load_without_crashing"],
    "deepspeed": ["test_resize_*_with_deepspeed*"],
    "PyTesseract": ["test_pipeline_document_question_answering*"],
    "av": ["test_pipeline_video_classification*"],
    "librosa": ["test_apply_chat_template_audio", "test_chat_template_audio_sampling_rate"],
    "torchcodec": [
        "test_apply_chat_template_decoded_video",
        "test_apply_chat_template_video",
        "test_chat_template_audio_from_video",
    ],
    "RUN_SLOW=1; tests/test_remote_code.py has a test of the same": ["test_pil_can_run_without_torchvision"],
}


class Outcomes:
    """A pytest plugin that records which common tests pass and which are skipped."""

    def __init__(self):
        self.passed: set[str] = set()
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file, _, name = report.nodeid.partition("::")
        if Path(file).name != Path(__file__).name or "::" not in name or hasattr(report, "context"):  # not of subtests
            return
        if report.skipped:
            self.skipped[name.split("::")[1]] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
        elif report.when == "call" and report.passed:
            self.passed.add(name.split("::")[1])


@pytest.fixture(scope="module", autouse=True)
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    recorder = Outcomes()
    request.config.pluginmanager.register(recorder)
    yield recorder
    request.config.pluginmanager.unregister(recorder)


class AlignZegModelTester:
    """The model tester for the common tests: a small config and its inputs."""

    batch_size = 2
    is_training = True
    image_size = 32
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = len(CLASSES)
    seq_length = (32 // 8) ** 2  # tokens of the image encoder
    key_length = seq_length // 4  # `sequence_reduction_ratio` is 2

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return tiny_config(unseen_labels=[])

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": modeling.floats_tensor(shape)}


class ImageSegmentationPipelineTests:
    """Replaces that pipeline's checks, which are missing in the source distribution."""

    def get_test_pipeline(
        self, model: AlignZegModel, tokenizer: None, image_processor: AlignZegImageProcessor, dtype: str = "float32"
    ) -> tuple[ImageSegmentationPipeline, list]:
        segmenter = pipeline(
            "image-segmentation", model=model.to(getattr(torch, dtype)), image_processor=image_processor, dtype=dtype
        )
        return segmenter, [picture(0), picture(1)]

    def run_pipeline_test(self, segmenter: ImageSegmentationPipeline, examples: list) -> None:
        for image, segments in zip(examples, segmenter(examples, subtask="semantic")):
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
        """Provides a tiny checkpoint to the pipeline tests in place of one on the Hub."""
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
            patch = unittest.mock.patch.object(pipelines, name, value)
            patch.start()
            cls.addClassCleanup(patch.stop)

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

    def test_model_get_set_embeddings(self):  # the common test needs token embeddings; EoMT and Mask2Former skip it
        model = AlignZegModel(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), torch.nn.Conv2d)
        new = torch.nn.Conv2d(3, 16, 8, 4, 2)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new is model.side_network.stem.convolutions[0]
        assert model.get_output_embeddings() is None

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        # The common test uses the first layer that it finds, a layer of the frozen tower, which never needs checkpointing.
        with unittest.mock.patch.object(modeling, "GradientCheckpointingLayer", AlignZegEncoderLayer):
            super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_sdpa_can_dispatch_composite_models(self):  # the common test looks for the towers at the model's root
        with tempfile.TemporaryDirectory() as folder:
            AlignZegModel(self.model_tester.get_config()).save_pretrained(folder)
            for options, expected in (({}, "sdpa"), ({"attn_implementation": "eager"}, "eager")):
                model = AlignZegModel.from_pretrained(folder, **options)
                parts = (model, model.recognizer.vision_model, model.text_encoder.text_model)
                assert {part.config._attn_implementation for part in parts} == {expected}

    @unittest.skip("see DOES_NOT_APPLY")
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
        return {"template_set": ["{}"]}  # unchanged names, to compare with the tokenizer's output

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


def test_every_skip_is_listed(outcomes: Outcomes) -> None:
    listed = {
        pattern: reason
        for reasons in (DOES_NOT_APPLY, NOT_ON_EVERY_MACHINE)
        for reason, patterns in reasons.items()
        for pattern in patterns
    }

    def find(name):
        return [pattern for pattern in listed if fnmatch.fnmatchcase(name, pattern)]

    unlisted = {name: reason for name, reason in outcomes.skipped.items() if not find(name)}
    assert not unlisted
    always = {pattern for patterns in DOES_NOT_APPLY.values() for pattern in patterns}
    assert not [name for name in outcomes.passed if always & set(find(name))], (
        "listed as not applicable, yet it passes"
    )
    if len(outcomes.passed) + len(outcomes.skipped) > 300:  # the whole file ran
        stale = always - {pattern for name in outcomes.skipped for pattern in find(name)}
        assert not stale, "no skipped test has such a name any more"


def test_no_more_is_skipped_than_in_mask2former(outcomes: Outcomes) -> None:
    mixin = modeling.ModelTesterMixin
    names = {name for name in dir(mixin) if name.startswith("test_") and callable(getattr(mixin, name))}
    passed, skipped = names & outcomes.passed, names & set(outcomes.skipped)
    if passed | skipped < names:
        pytest.skip("only some of the common tests ran")
    assert len(passed) >= 96  # as many as EoMT passes
    assert len(skipped) <= 85  # as many as Mask2Former's test file skips without an accelerator
