# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Exports a checkpoint as two ONNX files that run without torch: image to label map, and tokens to prototypes.

The network comes from `torch.export`. The resize of the image before it and of the scores after it is written as ONNX text,
because their sizes are computed from the image, which `torch.export` cannot trace.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel, AlignZegProcessor
from modeling_alignzeg.layers_alignzeg import content_mask
from modeling_alignzeg.processing_alignzeg import get_templates
from modeling_alignzeg.readout_alignzeg import cell_probabilities, class_probabilities
from modeling_alignzeg.text_encoder_alignzeg import AlignZegTextEncoder
from modeling_alignzeg.visualization_alignzeg import palette

from .files import atomic_folder, check_output


if TYPE_CHECKING:
    import onnx

FILES = ("image.onnx", "text.onnx", "tokenizer.json", "alignzeg.json")
STORED_BITS = {"image.onnx": 16, "text.onnx": 8}  # per weight, in folders for the browser
SMALLEST_QUANTIZED = 2**14  # elements of a matrix
Weights = Literal["float32", "int8", "browser"]
FILTERS = {2: 'mode="linear"', 3: 'mode="cubic", cubic_coeff_a=-0.5'}  # by PIL's number
HEADER = '<ir_version: 10, opset_import: ["": 20]>'


class ScoreMaps(nn.Module):
    """AlignZeg without its text tower, from pixels to the class scores of the cells of its grids."""

    def __init__(self, model: AlignZegModel, uses_cells: bool, on_scores: bool):
        super().__init__()
        self.model, self.uses_cells, self.on_scores = model, uses_cells, on_scores

    def forward(
        self,
        pixel_values: Tensor,
        content: Tensor,
        text_prototypes: Tensor,
        seen_class_mask: Tensor,
        gamma: Tensor,
        threshold: Tensor,
    ) -> tuple[Tensor, ...]:
        """
        Args:
            pixel_values: `(B, 3, H, W)`.
            content: `int64 (2,)`: height and width of the images without padding, in pixels.
            text_prototypes: `(C, D)`.
            seen_class_mask: `bool (C,)`.
            gamma, threshold: `()`, see [`class_probabilities`].

        Returns:
            Scores of the proposals on the mask grid, `(B, C, h, w)`, and, with `uses_cells`, probabilities of the tower's
            cells `(B, C, h, w)`.
        """
        batch, _, height, width = pixel_values.shape
        mask = content_mask(content.expand(batch, 2), (height, width))
        outputs = self.model(
            pixel_values=pixel_values,
            pixel_mask=mask.long(),
            text_prototypes=text_prototypes,
            seen_class_mask=seen_class_mask,
        )
        probabilities = class_probabilities(
            outputs.class_queries_logits, outputs.unseen_logits, seen_class_mask, gamma, threshold, self.on_scores
        )
        masks = outputs.masks_queries_logits.float().sigmoid()
        scores = (probabilities[..., :-1].mT @ masks.flatten(2)).unflatten(2, masks.shape[2:])
        return (scores, cell_probabilities(outputs.dense_logits)) if self.uses_cells else (scores,)


class Prompts(nn.Module):
    """Tokenized prompts `int64 (classes, templates, length)` to unit prototypes `(classes, D)`.

    No attention mask: CLIP pools a text at its end token, which does not attend to the padding after it.
    """

    def __init__(self, text_encoder: AlignZegTextEncoder):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids)


def network_graph(module: nn.Module, example: dict[str, Tensor], shapes: tuple, outputs: list[str]) -> onnx.ModelProto:
    """Exports `module` with the inputs in `example` to an ONNX graph; `shapes` gives the dynamic axes."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        module.requires_grad_(False)
        with torch.no_grad():
            program = torch.export.export(module.eval(), tuple(example.values()), dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=20,
            input_names=list(example),
            output_names=outputs,
            verbose=False,
        )
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    assert exported is not None  # only the old exporter returns None
    return exported.model_proto


def score_graph(model: AlignZegModel, uses_cells: bool, on_scores: bool) -> onnx.ModelProto:
    """[`ScoreMaps`] with dynamic batch, height, width and number of classes."""
    divisor, dimension = model.config.size_divisor, torch.export.Dim
    rows, columns = (divisor * dimension(name, min=2, max=4096) for name in ("rows", "columns"))
    classes = dimension("classes", min=2, max=2**24)
    example = {
        "pixel_values": torch.zeros(2, 3, 3 * divisor, 4 * divisor),
        "content": torch.tensor([3 * divisor - 3, 4 * divisor - 5]),
        "text_prototypes": torch.eye(5, model.config.projection_dim),
        "seen_class_mask": torch.tensor([True, True, False, True, True]),
        "gamma": torch.tensor(1.0),
        "threshold": torch.tensor(0.5),
    }
    shapes: tuple = (
        {0: dimension("batch", min=1, max=4096), 2: rows, 3: columns},
        {},
        {0: classes},
        {0: classes},
        {},
        {},
    )
    return network_graph(
        ScoreMaps(model, uses_cells, on_scores), example, shapes, ["scores", "cells"][: 1 + uses_cells]
    )


def text_graph(model: AlignZegModel) -> onnx.ModelProto:
    """[`Prompts`] with dynamic numbers of classes, templates and tokens."""
    dimension, longest = torch.export.Dim, model.config.text_config.max_position_embeddings
    example = {"input_ids": torch.ones(2, 3, min(5, longest), dtype=torch.int64)}
    shapes = (
        {
            0: dimension("classes", min=1, max=2**24),
            1: dimension("templates", min=1, max=4096),
            2: dimension("length", min=2, max=longest),
        },
    )
    return network_graph(Prompts(model.text_encoder), example, shapes, ["text_prototypes"])


def pixels_graph(image_processor: Any, divisor: int) -> onnx.ModelProto:
    """The image processor as a graph: images `uint8 (B, H, W, 3)` to `pixel_values` and `content`.

    As PIL, it resizes in two passes and rounds each to 8 bits, halves up. Under 2 % of the values differ from PIL's, by 1 of
    255 and rarely by 2. At ratios such as 3:2, where many values are halves, up to 10 % differ.

    Raises:
        ValueError: The image processor has a setting that ONNX lacks.
    """
    import onnx

    processor = image_processor
    if processor.do_resize and processor.resample not in FILTERS:
        raise ValueError(
            f"`resample` of the image processor is {processor.resample}; ONNX resizes with 2 (bilinear) or 3 (bicubic)."
        )
    mean = np.broadcast_to(np.float64(processor.image_mean if processor.do_normalize else 0), 3)
    std = np.broadcast_to(np.float64(processor.image_std if processor.do_normalize else 1), 3)
    factor = (processor.rescale_factor if processor.do_rescale else 1) / std
    resize = FILTERS.get(processor.resample, "")
    return onnx.parser.parse_model(f"""
        {HEADER}
        pixels (uint8[batch, height, width, 3] image) => (float[batch, 3, rows, columns] pixel_values, int64[2] content)
        <float[3, 1, 1] factor = {{{_numbers(factor)}}}, float[3, 1, 1] offset = {{{_numbers(-mean / std)}}}>
        {{
            one = Constant <value_ints=[1]> ()
            two = Constant <value_ints=[2]> ()
            shape = Shape <start=1, end=3> (image)
            {_resized_shape(processor)}
            content = Identity (sides)
            batch_axis = Shape <start=0, end=1> (image)
            channels = Constant <value_ints=[3]> ()
            planes = Transpose <perm=[0, 3, 1, 2]> (image)
            numbers = Cast <to=1> (planes)
            black = Constant <value_float=0.0> ()
            white = Constant <value_float=255.0> ()
            half = Constant <value_float=0.5> ()
            height_axis = Shape <start=1, end=2> (image)
            width_axis = Slice (sides, one, two)
            wide_target = Concat <axis=0> (batch_axis, channels, height_axis, width_axis)
            wide = Resize <{resize}, antialias=1, exclude_outside=1> (numbers, , , wide_target)
            wide_raised = Add (wide, half)
            wide_whole = Floor (wide_raised)
            wide_clipped = Clip (wide_whole, black, white)
            target = Concat <axis=0> (batch_axis, channels, sides)
            resized = Resize <{resize}, antialias=1, exclude_outside=1> (wide_clipped, , , target)
            resized_raised = Add (resized, half)
            whole = Floor (resized_raised)
            clipped = Clip (whole, black, white)
            multiplied = Mul (clipped, factor)
            normalized = Add (multiplied, offset)
            divisor = Constant <value_ints=[{divisor}]> ()
            smallest = Constant <value_ints=[{2 * divisor}]> ()
            before = Sub (divisor, one)
            past = Add (sides, before)
            blocks = Div (past, divisor)
            padded = Mul (blocks, divisor)
            full = Max (padded, smallest)
            rest = Sub (full, sides)
            none = Constant <value_ints=[0, 0, 0, 0, 0, 0]> ()
            pads = Concat <axis=0> (none, rest)
            pixel_values = Pad (normalized, pads)
        }}""")


def _resized_shape(processor: Any) -> str:
    """Lines of [`pixels_graph`] that compute `sides`, the height and width after resizing, from `shape`."""
    size = dict(processor.size)
    if not processor.do_resize:
        return "sides = Identity (shape)"
    if size.get("height") and size.get("width"):
        return f"sides = Constant <value_ints=[{size['height']}, {size['width']}]> ()"
    if size.get("shortest_edge") or size.get("longest_edge"):
        shortest = size.get("shortest_edge") or size["longest_edge"]
        longest = size.get("longest_edge") or 4 * shortest
        # The short side becomes `shortest`, unless the long one would then exceed `longest`.
        return f"""
            shortest = Constant <value_ints=[{shortest}]> ()
            longest = Constant <value_ints=[{longest}]> ()
            least = Constant <value_ints=[{min(processor.size_divisor, shortest)}]> ()
            short = ReduceMin <keepdims=1> (shape)
            long = ReduceMax <keepdims=1> (shape)
            scaled = Mul (shape, shortest)
            grown = Div (scaled, short)
            limited = Min (grown, longest)
            product = Mul (longest, short)
            twice = Mul (product, two)
            raised = Add (twice, long)
            doubled = Mul (long, two)
            rounded = Div (raised, doubled)
            lowered = Min (rounded, shortest)
            narrow = Max (lowered, least)
            is_short = Equal (shape, short)
            sides = Where (is_short, narrow, limited)"""
    raise ValueError(
        f"`size` of the image processor is {size}; expected `shortest_edge` and/or `longest_edge`, or `height` and `width`."
    )


def _numbers(values: np.ndarray) -> str:
    return ", ".join(repr(float(value)) for value in values)


def readout_graph(stride: int, dense_weight: float) -> onnx.ModelProto:
    """Scores `(B, C, h, w)` of proposals, and of cells unless their weight is 0, to the best class of every pixel of
    the image, `int32 (B, H, W)`.

    It loops over the classes that can win a pixel, so their scores at full size are never in memory together. The argmax of
    `proposals^(1 - a) · cells^a` equals that of `proposals · cells^(a / (1 - a))`.

    Args:
        stride: Input pixels per side of a cell of `scores`.
        dense_weight: `a`, from 0 to 1.
    """
    import onnx

    cells = ", float[batch, classes, down, across] cells" if dense_weight else ""
    matrices = _matrices("scores", f"stride = Constant <value_float={float(stride)}> ()\n cut = Div (inside, stride)")
    body, bounds = _enlarged("scores", "score"), _bounds("scores", 3)
    power = dense_weight / (1 - dense_weight) if dense_weight < 1 else 1.0

    def product(scores: str, cells: str, result: str) -> str:
        if dense_weight in (0, 1):
            return f"{result} = Identity ({cells if dense_weight else scores})\n"
        if power == 1:
            return f"{result} = Mul ({scores}, {cells})\n"
        return f"{result}_power = Pow ({cells}, power)\n {result} = Mul ({scores}, {result}_power)\n"

    if power not in (0, 1):
        matrices += f"power = Constant <value_float={power}> ()\n"
    if dense_weight:
        share = """
            grid = Shape <start=2, end=4> (scores)
            sides = Cast <to=1> (grid)
            part = Div (scores_cut, sides)
            coarse = Shape <start=2, end=4> (cells)
            cells_sides = Cast <to=1> (coarse)
            cut = Mul (part, cells_sides)"""
        matrices += _matrices("cells", share)
        body += _enlarged("cells", "cell")
        bounds += _bounds("cells", 5) + "".join(_on_grid_of_scores(f"cells_{which}") for which in ("most", "least"))
    body += product("score", "cell", "total")
    for which in ("most", "least"):
        bounds += product(f"scores_{which}", f"cells_{which}_here", which)
    return onnx.parser.parse_model(f"""
        {HEADER}
        readout (float[batch, classes, rows, columns] scores{cells}, int64[2] content, uint8[batch, height, width, 3] image)
            => (int32[batch, height, width] label_map)
        {{
            zero = Constant <value_float=0.0> ()
            half = Constant <value_float=0.5> ()
            one = Constant <value_float=1.0> ()
            start = Constant <value_int=0> ()
            step = Constant <value_int=1> ()
            first = Constant <value_int=0> ()
            second = Constant <value_int=1> ()
            inside = Cast <to=1> (content)
            {matrices}
            {bounds}
            class_axis = Constant <value_ints=[1]> ()
            first_axis = Constant <value_ints=[0]> ()
            other_axes = Constant <value_ints=[0, 2, 3]> ()
            surely = ReduceMax (least, class_axis)
            rounding = Constant <value_float=0.9999> ()
            needed = Mul (surely, rounding)
            loses = Less (most, needed)
            may_win = Not (loses)
            numbers = Cast <to=1> (may_win)
            ever = ReduceMax <keepdims=0> (numbers, other_axes)
            places = NonZero (ever)
            candidates = Squeeze (places, first_axis)
            label_shape = Shape <start=0, end=3> (image)
            lowest = ConstantOfShape <value = float[1] {{-1.0}}> (label_shape)
            nothing = ConstantOfShape <value = int32[1] {{0}}> (label_shape)
            every = Shape (candidates)
            count = Squeeze (every)
            best_score, label_map = Loop (count, , lowest, nothing) <body = race
                (int64 index, bool go, float[batch, height, width] best, int32[batch, height, width] label)
                => (bool go_on, float[batch, height, width] next_best, int32[batch, height, width] next_label)
            {{
                go_on = Identity (go)
                class = Gather (candidates, index)
                {body}
                is_better = Greater (total, best)
                next_best = Max (total, best)
                number = Cast <to=6> (class)
                next_label = Where (is_better, number, label)
            }}>
        }}""")


def _matrices(grid: str, content: str) -> str:
    """The interpolation matrices of [`resize_matrix`] from `grid` to the pixels of the image: `{grid}_down (H, h)` and
    `{grid}_right (w, W)`. `content` computes `cut (2,)`, the cells without padding."""
    lines = [content.replace("cut =", f"{grid}_cut ="), f"{grid}_end = Ceil ({grid}_cut)"]
    for name, axis, index in (("down", 1, "first"), ("right", 2, "second")):
        key = f"{grid}_{name}"
        lines.append(f"""
            {key}_pixels = Shape <start={axis}, end={axis + 1}> (image)
            {key}_length = Squeeze ({key}_pixels)
            {key}_count = Shape <start={axis + 1}, end={axis + 2}> ({grid})
            {key}_cells = Squeeze ({key}_count)
            {key}_target = Cast <to=1> ({key}_length)
            {key}_content = Gather ({grid}_cut, {index})
            {key}_stop = Gather ({grid}_end, {index})
            {key}_last = Sub ({key}_stop, one)
            {key}_scale = Div ({key}_content, {key}_target)
            {key}_range = Range (start, {key}_length, step)
            {key}_number = Cast <to=1> ({key}_range)
            {key}_middle = Add ({key}_number, half)
            {key}_scaled = Mul ({key}_middle, {key}_scale)
            {key}_place = Sub ({key}_scaled, half)
            {key}_position = Clip ({key}_place, zero, {key}_last)
            {key}_indices = Range (start, {key}_cells, step)
            {key}_cell = Cast <to=1> ({key}_indices)
            {key}_axis = Constant <value_ints=[{1 if name == "down" else 0}]> ()
            {key}_other = Constant <value_ints=[{0 if name == "down" else 1}]> ()
            {key}_positions = Unsqueeze ({key}_position, {key}_axis)
            {key}_grid = Unsqueeze ({key}_cell, {key}_other)
            {key}_apart = Sub ({key}_positions, {key}_grid)
            {key}_distance = Abs ({key}_apart)
            {key}_weight = Sub (one, {key}_distance)
            {key} = Relu ({key}_weight)""")
    return "\n".join(lines)


def _enlarged(grid: str, name: str) -> str:
    """`name (B, H, W)`: class `class` of `grid`, at the pixels of the image."""
    return f"""
        {name}_cells = Gather <axis=1> ({grid}, class)
        {name}_wide = MatMul ({name}_cells, {grid}_right)
        {name} = MatMul ({grid}_down, {name}_wide)
        """


def _bounds(grid: str, size: int) -> str:
    """`{grid}_most` and `{grid}_least`, of the shape of `grid`: the extremes of every `size` x `size` cells. They bound the
    interpolated values in the cell in the middle."""
    pool = f"MaxPool <kernel_shape=[{size}, {size}], pads=[{', '.join([str(size // 2)] * 4)}]>"
    return f"""
        {grid}_most = {pool} ({grid})
        {grid}_negative = Neg ({grid})
        {grid}_highest = {pool} ({grid}_negative)
        {grid}_least = Neg ({grid}_highest)
        """


def _on_grid_of_scores(name: str) -> str:
    """`{name}_here`: `name` on the finer grid of `scores`. A cell of `scores` that lies in two cells gets the value of the
    first, which must bound both."""
    return f"""
        {name}_shape = Shape (scores)
        {name}_here = Resize <mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">
            ({name}, , , {name}_shape)
        """


def label_map_graph(model: AlignZegModel, image_processor: AlignZegImageProcessor) -> onnx.ModelProto:
    """Converts images of one size to label maps of that size.

    Inputs: `image`, uint8 (batch, height, width, 3); `text_prototypes`, float32 (classes, projection_dim), unit vectors of
    at least two classes; `seen_class_mask`, bool (classes,). Output: `label_map`, int32 (batch, height, width). The image
    processor's correction and weight of the cells are built in.

    Raises:
        ValueError: The image processor has a setting that ONNX lacks.
    """
    from onnx import TensorProto, helper

    weight = image_processor.dense_weight if model.cell_classifier is not None else 0.0
    pixels = pixels_graph(image_processor, model.config.size_divisor)  # raises errors before the slow part
    network = score_graph(model, weight > 0, image_processor.correction_on_scores)
    readout = readout_graph(model.config.mask_stride, weight)
    values = {value.name: value for part in (pixels, network) for value in part.graph.input}
    values = {name: values[name] for name in ("image", "text_prototypes", "seen_class_mask")}
    joined = _joined([pixels, network, readout], values)
    for name, default in (
        ("gamma", image_processor.correction_gamma),
        ("threshold", image_processor.correction_threshold),
    ):
        joined.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [default]))
    return joined


def _joined(parts: list[onnx.ModelProto], inputs: dict[str, onnx.ValueInfoProto]) -> onnx.ModelProto:
    """Chains graphs; an output feeds the input of the same name."""
    from onnx import compose, helper

    renamed = [
        compose.add_prefix(part, f"{part.graph.name}/", rename_inputs=False, rename_outputs=False) for part in parts
    ]
    graph = helper.make_graph(
        [node for part in renamed for node in part.graph.node],
        "alignzeg",
        list(inputs.values()),
        list(renamed[-1].graph.output),
        [value for part in renamed for value in part.graph.initializer],
    )
    return helper.make_model(graph, ir_version=parts[0].ir_version, opset_imports=parts[0].opset_import)


def store_small(model: onnx.ModelProto, bits: int) -> None:
    """Stores large weights in fewer bits; the graph converts them to float32 when it is loaded.

    With 16 bits they are float16. With 8, matrices are int8 with one float32 scale per row, and other weights float16.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph, nodes = model.graph, []
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < 1024:
            continue
        name, stored = tensor.name, f"{tensor.name}.stored"
        if bits == 8 and values.ndim == 2:
            scale = np.maximum(np.abs(values).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny)
            tensor.CopyFrom(numpy_helper.from_array(np.rint(values / scale).astype(np.int8), stored))
            graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
            nodes.append(helper.make_node("Cast", [stored], [f"{name}.whole"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", [f"{name}.whole", f"{name}.scale"], [name]))
        elif np.abs(values).max() <= np.finfo(np.float16).max:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
            nodes.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)


def write_quantized(model: onnx.ModelProto, path: Path) -> None:
    """Writes `model` with products of activations and large matrices in 8-bit integers.

    Matrices have one scale per column and 7 bits, because sums of two products of 8 bits overflow in the instructions of
    CPUs without VNNI. Scale and offset of activations are computed for every tensor at run time.
    """
    from onnx import numpy_helper
    from onnxruntime.quantization import quantize_dynamic

    graph = model.graph
    matrices = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in matrices]:
        turned = np.ascontiguousarray(numpy_helper.to_array(matrices[node.input[0]]).T)
        matrices[node.output[0]] = numpy_helper.from_array(turned, node.output[0])
        graph.initializer.append(matrices[node.output[0]])
        graph.node.remove(node)
    del graph.value_info[:]  # types of intermediate tensors, which are no longer right
    large = {name for name, tensor in matrices.items() if np.prod(tensor.dims) >= SMALLEST_QUANTIZED}
    chosen = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in large]
    if chosen:  # an empty list would stand for all nodes
        quantize_dynamic(model, path, nodes_to_quantize=chosen, per_channel=True, reduce_range=True)
    else:
        path.write_bytes(model.SerializeToString())


def check_folder(folder: str | Path) -> Path:
    """Checks that [`export_folders`] can write to `folder`, and returns it with links resolved.

    Raises:
        ValueError: `folder` contains other files, or cannot be written.
    """
    path = check_output(Path(folder) / FILES[0]).parent
    if others := sorted({file.name for file in path.iterdir()} - set(FILES) if path.exists() else ()):
        raise ValueError(f"{folder} contains {others[0]}, which would be lost: choose a new folder.")
    return path


def export_folders(model: AlignZegModel, processor: AlignZegProcessor, folders: dict[str | Path, Weights]) -> None:
    """Writes `FILES` to each of `folders`, for segmentation by class names with onnxruntime and tokenizers or in a browser.

    - `image.onnx`: see [`label_map_graph`];
    - `text.onnx`: `input_ids`, int64 (classes, templates, length), to `text_prototypes`, float32 (classes,
      projection_dim);
    - `tokenizer.json`: for the `tokenizers` library;
    - `alignzeg.json`: `templates`, `max_length` (tokens), the checkpoint's own `classes` and `unseen` ones, `colors`, and
      `bytes`, the sizes of the ONNX files.

    Args:
        folders: Maps each folder to its weights: `"float32"`; `"int8"`, see [`write_quantized`], in `image.onnx`;
            `"browser"`, stored in fewer bits, as in `STORED_BITS`. A folder is new, empty, or contains only such files,
            which are replaced.

    Raises:
        ImportError: `onnx`, `onnxscript` or, for `"int8"`, `onnxruntime` is missing.
        ValueError: The image processor has a setting that ONNX lacks, a folder cannot be written, or the text tower takes
            texts of one length only.
    """
    if model.text_encoder.fixed_length is not None:
        raise ValueError(
            "A folder cannot be exported on SigLIP, whose texts are all padded to one length. Export to a file, such as "
            "model.onnx, and the text prototypes with `--prototypes`."
        )
    needed = ["onnxscript"] + ["onnxruntime"] * ("int8" in folders.values())
    for name in needed:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"ONNX export needs onnx and {name}: pip install onnx {name}") from error
    places = {check_folder(folder): weights for folder, weights in folders.items()}
    model = model.float().cpu()
    graphs = {"image.onnx": label_map_graph(model, processor.image_processor), "text.onnx": text_graph(model)}
    for path, weights in places.items():
        with atomic_folder(path) as partial:
            for name, graph in graphs.items():
                write_graph(graph, partial / name, weights)
            sizes = {name: (partial / name).stat().st_size for name in graphs}
            text = json.dumps({**_settings(model, processor), "bytes": sizes}, ensure_ascii=False, indent=1)
            (partial / "alignzeg.json").write_text(text, encoding="utf-8")
            tokenizer = processor.tokenizer.backend_tokenizer
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.save(str(partial / "tokenizer.json"), pretty=False)


def write_graph(graph: onnx.ModelProto, path: Path, weights: Weights) -> None:
    """Writes `image.onnx` or `text.onnx` with these weights, see [`export_folders`]; `graph` is not changed."""
    copy = type(graph)()
    copy.CopyFrom(graph)
    if weights == "int8" and path.name == "image.onnx":
        write_quantized(copy, path)
        return
    if weights == "browser":
        store_small(copy, STORED_BITS[path.name])
    path.write_bytes(copy.SerializeToString())


def _settings(model: AlignZegModel, processor: AlignZegProcessor) -> dict[str, Any]:
    config = model.config
    return {
        "templates": get_templates(config.template_set),
        "max_length": min(processor.tokenizer.model_max_length, config.text_config.max_position_embeddings),
        "classes": [config.id2label[index] for index in range(config.num_labels)],
        "unseen": config.unseen_labels,
        "colors": palette().tolist(),
    }
