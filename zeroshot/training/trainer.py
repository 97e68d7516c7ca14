# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The training loop, without the details of data, model and loss.

Every random choice depends only on the seed and the step (or the epoch and the sample). So a resumed run takes the same
steps as an uninterrupted one, and the samples do not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_alignzeg import AlignZegModel
from modeling_alignzeg.loss_alignzeg import MatchingCostError

from ..checkpoints import save_checkpoint
from ..data.dataset import SegmentationDataset
from ..data.statistics import similar_names
from ..data.task import check_task, open_task
from ..data.transforms import Collator
from ..evaluation.evaluator import Readout, evaluate_model, evaluation_batches, format_scores
from ..files import atomic_file, atomic_write_text, remove_partial_files, shown
from ..settings import Settings
from .card import trained_card
from .checkpoint_store import CheckpointError, CheckpointStore
from .feature_cache import feature_cache
from .guards import SignalStop, check_finite
from .manifest import PROGRESS
from .pseudo_labels import check_transductive, pseudo_labelled
from .report import (
    RunningMeans,
    choose_samples,
    draw_curves,
    draw_predictions,
    forget_later_steps,
    predict_samples,
    read_metrics,
)
from .setup import (
    build_model,
    build_transform,
    check_model,
    learning_rate_factor,
    parameter_groups,
    start_accelerator,
    train_only,
)


METRICS, CURVES, FIGURES = "metrics.jsonl", "curves.png", "figures"
SHOWN_IMAGES = 4  # in the figure of predictions
LOSSES = (
    "loss",
    "loss_class",
    "loss_mask",
    "loss_dice",
    "loss_auxiliary",
    "loss_unlabelled",
    "loss_virtual",
    "loss_diversity",
    "loss_indicator",
    "loss_cells",
)


LABEL_SETTINGS = (  # which files are read, and how
    *("image_column", "label_column", "image_folder", "label_folder", "image_suffix", "label_suffix", "label_file"),
    *("context_459_ids", "scene_seed"),
)


def difference(then: Any, now: Any) -> str:
    """What differs between two values, as text; of lists and dictionaries only the entries that differ."""
    kind = type(now)
    if kind is type(then) and kind in (list, dict):
        pairs = [list(each.items()) if kind is dict else each for each in (then, now)]
        first, second = (kind(entry for entry in mine if entry not in other) for mine, other in (pairs, pairs[::-1]))
        if not first and not second:
            return "another order"
        then, now = first, second
    return f"{shown(then)} then, {shown(now)} now"


def step_seed(seed: int, step: int, micro_step: int) -> int:
    return int(np.random.SeedSequence([seed, step, micro_step]).generate_state(1, np.uint64)[0] >> 1)


class Trainer:
    """One training run, in `settings.output_dir`.

    `run` trains until the last step or a signal, and returns the last validation scores.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.accelerator = start_accelerator(settings)
        self.output = Path(settings.output_dir)
        data, training = settings.data, settings.training
        # Checks of names and sizes, before all files are read and the model is loaded.
        transform = build_transform(data.transform)
        with self.accelerator.main_process_first():
            check_model(settings.model)
            task = open_task(data, validation=training.evaluate_every > 0)
        self.check_batch(len(task.train))
        if data.transductive:
            check_transductive(settings, task.split)
        self.split, self.training_split, rows = task.split, task.training_split, task.train
        if data.validate:
            check_task(self.accelerator, task)
        self.validation = None
        if task.validation is not None:
            self.validation = SegmentationDataset(task.validation, self.split, training=False)
        self.model, self.processor = build_model(settings.model, settings.seed)
        if training.trainable:
            train_only(self.model, training.trainable)
        self.model.set_vocabulary(list(self.training_split.seen), processor=self.processor)  # no unseen names
        self.model.to(self.accelerator.device)
        if data.transductive:  # here they do
            rows, self.training_split = pseudo_labelled(self.accelerator, self.model, self.processor, task, settings)
            self.model.set_vocabulary(list(self.training_split.seen), processor=self.processor)
        classes = list(self.split.classes)
        for warning in similar_names(self.model.get_text_prototypes(self.processor, classes), classes):
            self.accelerator.print(f"Warning: {warning}")
        image_processor = self.processor.image_processor
        image_processor.ignore_index = self.split.ignore_index
        transform = dataclasses.replace(
            transform, ignore_index=self.split.ignore_index, resample=image_processor.resample
        )
        seed = settings.seed if data.augmentation_seed is None else data.augmentation_seed
        self.dataset = SegmentationDataset(
            rows,
            self.training_split,
            transform,
            training=True,
            seed=seed,
            in_memory=data.in_memory,
            repeated_epochs=data.cached_epochs,
        )
        self.clip_cache = None
        if data.cached_epochs:
            # With a folder, the main process fills it for the others; without one, each process computes its own.
            with self.accelerator.main_process_first() if data.feature_folder else nullcontext():
                self.clip_cache = feature_cache(
                    self.model, image_processor, self.dataset, data.cached_epochs, data.feature_folder
                )

        collator = Collator(image_processor, transform.crop_size or self.model.config.size_divisor)
        loader = DataLoader(
            self.dataset,
            batch_size=training.batch_size,
            shuffle=True,
            collate_fn=collator,
            num_workers=data.num_workers,
            drop_last=True,
            persistent_workers=data.num_workers > 0,
        )
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, training.weight_decay), lr=training.learning_rate, betas=(0.9, 0.999)
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, training.steps, training.warmup_steps, training.schedule),
        )
        self.network, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.model, optimizer, loader, scheduler
        )
        self.store = CheckpointStore(self.output / "checkpoints", keep=training.keep_checkpoints)
        self.step, self.epoch, self.batch = 0, 0, 0
        self.best: float | None = None
        self.means = RunningMeans(LOSSES, self.accelerator.device)

    def check_batch(self, images: int) -> None:
        """
        Raises:
            ValueError: The training part has too few images for one optimizer step.
        """
        training, processes = self.settings.training, self.accelerator.num_processes
        if images // training.batch_size // processes < training.gradient_accumulation_steps:
            needed = training.batch_size * processes * training.gradient_accumulation_steps
            raise ValueError(
                f"The training part has {images:,} images, but one step needs {needed:,}: lower `training.batch_size` or "
                "`training.gradient_accumulation_steps`, or add data."
            )

    # --- state

    def progress(self) -> dict[str, Any]:
        """The progress that a checkpoint stores besides tensors; all processes call it."""
        progress = {"step": self.step, "epoch": self.epoch, "batch": self.batch, "best": self.best}
        return {**progress, "means": self.means.state(self.accelerator), "task": self.task}

    @cached_property
    def task(self) -> dict[str, Any]:
        """What a resumed run must share with the first one: data and classes. Otherwise, its unseen classes may have been
        labelled in earlier steps."""
        data, split = self.settings.data, self.split
        return {
            "data.dataset": data.dataset,
            "data.train_part": data.train_part,
            "images": len(self.dataset),
            "classes": list(split.classes),
            "labelled classes": list(split.seen if data.transductive else self.training_split.seen),
            "transductive": data.transductive,
            **{f"data.{name}": getattr(data, name) for name in LABEL_SETTINGS},
            "image names": self.dataset.names_digest(),
            "ids of label maps": {str(raw): target for raw, target in sorted(split.raw_id_to_class.items())},
            "colours of label maps": {str(color): target for color, target in sorted(split.palette.items())},
        }

    def save(self) -> None:
        self.store.save(self.accelerator, self.network, self.optimizer, self.scheduler, self.progress())

    def resume(self) -> None:
        path = self.store.latest(self.accelerator)
        if path is None:
            self.accelerator.print(f"Starting a new training in {self.output}")
            return
        earlier = json.loads((path / PROGRESS).read_text(encoding="utf-8")).get("task", {})
        task = self.task
        if earlier:  # runs of earlier versions stored less
            earlier = {**task, "transductive": False, **earlier}
        for name, value in task.items():
            if earlier.get(name) != value:
                hint = " (by `unseen`, `data.fully_supervised` or `data.pseudo_unseen`)" if "labelled" in name else ""
                raise CheckpointError(
                    f"{path} was trained with other {name}{hint}: {difference(earlier.get(name), value)}. Choose another "
                    f"`output_dir`, or restore the settings in {self.output}/settings.json."
                )
        state = self.store.load(self.accelerator, path, self.network, self.optimizer, self.scheduler)
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.best = state["best"]
        self.means.load(state.get("means"))
        if self.step >= self.settings.training.steps:
            self.accelerator.print(
                f"This training is finished ({self.step} of {self.settings.training.steps} steps): only {self.output}/final "
                "is written again. To train longer, raise `training.steps`."
            )
        else:
            self.accelerator.print(f"Resuming at step {self.step} from {path}")

    # --- loop

    def micro_batches(self) -> Iterator[dict[str, Any]]:
        """Endless batches from the current position; updates `self.epoch` and `self.batch`."""
        while True:
            self.dataset.set_epoch(self.epoch)
            loader = self.accelerator.skip_first_batches(self.loader, self.batch) if self.batch else self.loader
            for each in {self.loader, loader}:  # the skipping loader is new, and may count epochs from 0
                each.set_epoch(self.epoch)
            for batch in loader:
                self.batch += 1
                yield batch
            self.epoch, self.batch = self.epoch + 1, 0

    def run(self) -> dict[str, Any] | None:
        settings = self.settings.training
        accelerator = self.accelerator
        if self.settings.resume:
            self.resume()
        elif self.store.latest(accelerator) is not None:
            raise CheckpointError(
                f"`resume` is off, but {self.output} contains checkpoints of an earlier run: choose another `output_dir`."
            )
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_partial_files(self.output)
            atomic_write_text(self.output / "settings.json", json.dumps(self.settings.as_dict(), indent=2) + "\n")
            forget_later_steps(self.output / METRICS, self.step)
        if accelerator.log_with:
            options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": self.step + 1}}
            options |= {"trackio": {"name": self.output.resolve().name, "resume": "allow", "embed": False}}
            # The name is TensorBoard's folder and trackio's project.
            accelerator.init_trackers("alignzeg" if settings.trackio else "tensorboard", init_kwargs=options)
        scores, first, started = None, self.step, time.time()
        self.network.train()
        bar = tqdm(
            total=settings.steps,
            initial=self.step,
            desc="train",
            disable=not accelerator.is_local_main_process,
            mininterval=1.0,
        )
        batches = self.micro_batches()
        with SignalStop() as stop, bar:
            while self.step < settings.steps:
                try:
                    terms = self.optimizer_step(batches)
                except FloatingPointError:  # on every process, of which another may have left already
                    with suppress(RuntimeError):
                        self.end()
                    raise
                self.step += 1
                bar.update()
                if terms is not None:
                    self.means.add(terms)
                if self.step % settings.log_every == 0 and (values := self.means.take(accelerator)):
                    self.log({f"train/{name}": value for name, value in values.items()})
                    bar.set_postfix(loss=f"{values['loss']:.3f}")
                last = self.step == settings.steps
                if settings.evaluate_every and (self.step % settings.evaluate_every == 0 or last):
                    scores = self.evaluate()
                    bar.write(f"step {self.step}: {format_scores(scores)}")
                stopping = stop.agreed(accelerator)
                if stopping or (settings.save_every and (self.step % settings.save_every == 0 or last)):
                    self.save()
                if stopping:
                    break
        seconds = time.time() - started  # since the start of this process, also in a resumed run
        if self.step >= settings.steps:
            self.finish(self.output / "final")
            if accelerator.is_main_process and first < settings.steps:
                timing = {
                    "seconds": round(seconds),
                    "steps": settings.steps,
                    "from_step": first,
                    "seconds_per_step": round(seconds / (settings.steps - first), 4),
                }
                atomic_write_text(self.output / "timing.json", json.dumps(timing) + "\n")
        else:
            accelerator.print(f"Stopped by a signal at step {self.step}; run the same command to resume.")
        self.end()
        if self.step < settings.steps:
            raise SystemExit(128 + (stop.received or 15))
        return scores

    def end(self) -> None:
        """Closes trackers and communication after a barrier: a process that exits early can abort the others."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def optimizer_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, Tensor] | None:
        """One step over `gradient_accumulation_steps` micro-batches; its loss terms, or `None` if it was skipped."""
        settings = self.settings.training
        accelerator = self.accelerator
        totals: dict[str, Tensor] = {}
        names: list[str] = []
        broken: MatchingCostError | None = None
        for micro_step in range(settings.gradient_accumulation_steps):
            batch = next(batches)
            if broken is not None:  # the step is skipped together with its batches
                continue
            torch.manual_seed(step_seed(self.settings.seed, self.step, micro_step))
            names += batch.pop("names")
            indices, epochs = (torch.as_tensor(batch.pop(key)) for key in ("indices", "epochs"))
            if self.clip_cache is not None:
                rows = epochs * len(self.dataset) + indices
                batch["clip_hidden_states"] = {
                    layer: states[rows].to(accelerator.device) for layer, states in self.clip_cache.items()
                }
            is_last = micro_step == settings.gradient_accumulation_steps - 1
            with nullcontext() if is_last else accelerator.no_sync(self.network):
                try:
                    outputs = self.network(**batch)
                except MatchingCostError as error:  # on all processes or none
                    broken, names = error, [names[len(names) - len(indices) + image] for image in error.images]
                    continue
                accelerator.backward(outputs.loss / settings.gradient_accumulation_steps)
            for name in LOSSES:
                value = getattr(outputs, name).detach() / settings.gradient_accumulation_steps
                totals[name] = totals.get(name, 0) + value
        if broken is not None:
            costs = broken.costs.items()
            checked: dict[str, Tensor | float] = {f"{term} cost of the matching": cost for term, cost in costs}
        else:
            checked = {**totals}
            norm = accelerator.clip_grad_norm_(self.network.parameters(), settings.max_grad_norm)
            if accelerator.mixed_precision != "fp16":
                checked["gradient norm"] = norm
        if not check_finite(accelerator, self.step, checked, names, settings.on_nan):
            self.optimizer.zero_grad()
            if accelerator.scaler is not None and broken is None:  # it has unscaled these gradients
                accelerator.scaler.update()
            self.scheduler.step()
            return None
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return totals

    # --- evaluation and output

    def evaluate(self) -> dict[str, Any]:
        """Scores on the validation part; keeps the best model by `training.best_metric`."""
        assert self.validation is not None
        model = self.accelerator.unwrap_model(self.network)
        prototypes = model.get_text_prototypes(self.processor, self.split.vocabulary)
        # The curves are without PBC, because its threshold is not calibrated yet.
        scores = evaluate_model(
            model,
            self.processor.image_processor,
            evaluation_batches(
                self.validation, self.processor, 2 * self.settings.training.batch_size, self.accelerator
            ),
            self.split,
            prototypes,
            {"default": Readout(gamma=0.0)},
            self.accelerator,
            progress=self.accelerator.is_local_main_process,
            num_images=len(self.validation),
        )["default"]
        self.log({f"validation/{n}": scores[n] for n in ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy")})
        self.draw(model, prototypes)
        metric = scores[self.settings.training.best_metric]
        if metric == metric and (self.best is None or metric > self.best):
            self.best = metric
            self.finish(self.output / "best")
        return scores

    def draw(self, model: AlignZegModel, prototypes: Tensor) -> None:
        """Writes figures of some predictions and of the curves to the folder of the run and to TensorBoard."""
        assert self.validation is not None
        if not self.accelerator.is_main_process:
            return
        samples = choose_samples(self.validation, SHOWN_IMAGES)
        labels = predict_samples(model, self.processor, samples, self.split, prototypes)
        sheet = draw_predictions(samples, labels, list(self.split.classes))
        with atomic_file(self.output / FIGURES / f"step-{self.step:08d}.png") as partial:
            sheet.save(partial)
        draw_curves(read_metrics(self.output / METRICS), self.output / CURVES)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"predictions": np.asarray(sheet)[None]}, step=self.step, dataformats="NHWC")

    def finish(self, folder: Path) -> None:
        """Writes the model with the benchmark's whole vocabulary and a card, in the format of
        `AutoModel.from_pretrained`."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.network)
            seen_only = (list(self.training_split.seen), model.class_text_embeds)
            model.set_vocabulary(self.split.vocabulary, list(self.split.unseen), self.processor)
            lines = read_metrics(self.output / METRICS)
            scores = next((line for line in lines if line["step"] == self.step and "validation/hiou" in line), {})
            scores = {name.removeprefix("validation/"): value for name, value in scores.items()}
            card = trained_card(self.settings, self.split, len(self.dataset), self.step, scores)
            save_checkpoint(model, self.processor, folder, str(card))
            model.set_vocabulary(seen_only[0], text_prototypes=seen_only[1])
        self.accelerator.wait_for_everyone()

    def log(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            with open(self.output / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
