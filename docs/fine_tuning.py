# %% [markdown]
# # Fine-tuning on 50 photographs
#
# This notebook fine-tunes the checkpoint for photographs with transformers' `Trainer` and with LoRA, and measures the
# words it was fine-tuned on (S) and words outside them (U) before and after. [fine_tuning.md](fine_tuning.md) is the
# short version.
#
# It needs `make install` and the parquet files of MSRC-21 in the folder `PHOTOS`. To use other images, change
# `samples`.

# %%
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, PrinterCallback, Trainer, TrainingArguments, set_seed

from zeroshot.data.benchmarks import load_benchmark
from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import load_split
from zeroshot.data.transforms import TrainTransform
from zeroshot.evaluation.evaluator import Readout, evaluate_model, evaluation_batches


CHECKPOINT, PHOTOS, RUNS = "../checkpoints/photos", "../data/photos", Path("../runs/fine_tuning")
DATASET, SPLIT = "msrc", "msrc_a"
NUM_TRAIN, NUM_TEST = 50, 236
CROP_SIZE, BATCH_SIZE, STEPS = 320, 4, 100

# %% [markdown]
# ## Data
#
# A sample is an image and its label map: class ids from 0, and 255 for unlabelled pixels. The ids are positions in
# `names`, the words to fine-tune on. Here they are the 16 seen classes of MSRC's split A; pixels of the 5 unseen classes
# are unlabelled. So fine-tuning never sees a label of the words outside. The checkpoint did: it was trained on COCO and
# on MSRC's training photographs, these 50 among them, with all words. U is therefore what fine-tuning leaves of them, and
# no zero-shot result. The test photographs are new to both.

# %%
split = load_split(SPLIT)
names, outside = list(split.seen), list(split.unseen)


def every_nth(part, count):
    """`count` photographs, evenly spaced, because neighbours show the same class."""
    rows = load_benchmark(DATASET, part, PHOTOS)
    return rows.select([index * len(rows) // count for index in range(min(count, len(rows)))])


class Samples(torch.utils.data.Dataset):
    """Images and label maps of `rows`, randomly scaled, cropped and flipped."""

    def __init__(self, rows):
        self.rows = rows
        self.transform = TrainTransform(CROP_SIZE, scale_range=(1.0, 1.5))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        labels = split.hide_unseen(split.map_raw(np.array(row["label"])))
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        return self.transform(np.array(row["image"].convert("RGB")), labels.astype(np.int64), generator)


samples = Samples(every_nth("train", NUM_TRAIN))
test_set = SegmentationDataset(every_nth("test", NUM_TEST), split, training=False)
print(f"{len(samples)} photographs to fine-tune on, {len(test_set)} to test")
print("fine-tuned:", ", ".join(names))
print("outside:   ", ", ".join(outside))

# %% [markdown]
# The processor turns label maps into `mask_labels` and `class_labels`, lists with one tensor per image, from which the
# model computes its loss. That is the whole collator:

# %%
processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)


def collate(batch):
    images, maps = zip(*batch)
    return dict(processor(images=list(images), segmentation_maps=list(maps), do_resize=False, return_tensors="pt"))


batch = collate([samples[0], samples[1]])
print({name: tuple(batch[name].shape) for name in ("pixel_values", "pixel_mask")})
print("classes per image:", [[names[i] for i in ids] for ids in batch["class_labels"]])

# %% [markdown]
# ## Model
#
# `set_vocabulary` makes `names` the classes of the loss. The image and text towers are frozen. Virtual features (FES)
# keep the classifier close to the frozen embeddings; `feature_expansion=False` disables them.


# %%
def load(**config):
    set_seed(0)
    model = AutoModel.from_pretrained(CHECKPOINT, trust_remote_code=True, **config)
    model.set_vocabulary(names, processor=processor)
    return model


def trainable_percent(model):
    parameters = list(model.parameters())
    return 100 * sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)


print(f"{trainable_percent(load()):.1f} % of the parameters are trainable")

# %% [markdown]
# ## Measure
#
# Every labelled pixel gets one of all 21 classes. S is the mIoU of the fine-tuned words, U that of the words outside,
# hIoU their harmonic mean. PBC, the correction towards words outside, is off (γ = 0) in the main columns.


# %%
def measure(model):
    scores = evaluate_model(
        model,
        processor.image_processor,
        evaluation_batches(test_set, processor, batch_size=8),
        split,
        model.get_text_prototypes(processor, list(split.classes)),
        {"plain": Readout(gamma=0.0), "pbc": Readout()},
        progress=False,
    )
    return {
        readout: {name: round(values[name], 2) for name in ("miou_seen", "miou_unseen", "hiou")}
        for readout, values in scores.items()
    }


def describe(result):
    return "S {miou_seen:.1f}, U {miou_unseen:.1f}, hIoU {hiou:.1f}".format(**result["plain"])


results = {"before": measure(load())}
print(describe(results["before"]))


# %% [markdown]
# ## Trainer
#
# `remove_unused_columns=False` and `label_names` are necessary: the collator needs the samples as they are, and the
# labels of the model have their own names.


# %%
def fine_tune(model, learning_rate):
    arguments = TrainingArguments(
        output_dir=str(RUNS),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=STEPS,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=STEPS // 10,
        weight_decay=0.05,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        label_names=["mask_labels", "class_labels"],
        save_strategy="no",
        logging_steps=max(STEPS // 4, 1),
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    seconds = trainer.train().metrics["train_runtime"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {' → '.join(f'{loss:.1f}' for loss in losses)}, {seconds / 60:.1f} minutes")
    return {"trainable_percent": round(trainable_percent(model), 2), "losses": losses, "seconds": round(seconds)}


model = load()
run = fine_tune(model, learning_rate=3e-4)
results["trainer"] = {**measure(model), **run}
print(describe(results["trainer"]))

# %% [markdown]
# The same without FES:

# %%
model = load(feature_expansion=False)
run = fine_tune(model, learning_rate=3e-4)
results["trainer_without_fes"] = {**measure(model), **run}
print(describe(results["trainer_without_fes"]))

# %% [markdown]
# ## LoRA
#
# LoRA adds two small matrices to each linear layer of the side network and of the adapters, and freezes the rest. FES
# is on, as in the checkpoint.

# %%
from peft import LoraConfig, PeftModel, get_peft_model


lora = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=r"(side_network|classifier|cell_classifier)\..*(q_proj|k_proj|v_proj|out_proj|mlp\.layers\.\d+)",
)
adapted = get_peft_model(load(), lora)
run = fine_tune(adapted, learning_rate=1e-3)
results["lora"] = {**measure(adapted.get_base_model()), **run}
print(f"{run['trainable_percent']:.1f} % of the parameters are trainable")
print(describe(results["lora"]))

# %% [markdown]
# The adapter is saved without the checkpoint and without its vocabulary. To use it, load the checkpoint, set the
# vocabulary and add the adapter; `merge_and_unload` returns an ordinary model without peft.

# %%
adapted.save_pretrained(RUNS / "adapter")
loaded = PeftModel.from_pretrained(load(), RUNS / "adapter").eval()
adapted.eval()
with torch.no_grad():
    inputs = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    expected, found = (each(**inputs).class_queries_logits for each in (adapted, loaded))
    merged = loaded.merge_and_unload()
    difference = (merged(**inputs).class_queries_logits - expected).abs().max().item()
assert torch.equal(found, expected) and difference < 1e-2
size = sum(file.stat().st_size for file in (RUNS / "adapter").glob("*.safetensors"))
print(f"adapter: {size / 1e3:.0f} kB")

# %% [markdown]
# Save the merged model with all 21 words as its vocabulary. The words outside count as unseen, so PBC applies.

# %%
merged.set_vocabulary(names + outside, unseen=outside, processor=processor)
merged.save_pretrained(RUNS / "merged")
processor.save_pretrained(RUNS / "merged")

# %% [markdown]
# ## Results

# %%
from IPython.display import Markdown


TITLES = {
    "before": "before",
    "trainer": "Trainer",
    "trainer_without_fes": "Trainer, without FES",
    "lora": "LoRA",
}
settings = {
    "checkpoint": Path(CHECKPOINT).name,
    "split": SPLIT,
    "fine_tuned": names,
    "outside": outside,
    "photographs": len(samples),
    "test_photographs": len(test_set),
    "crop_size": CROP_SIZE,
    "batch_size": BATCH_SIZE,
    "steps": STEPS,
}
(RUNS / "results.json").write_text(json.dumps({"settings": settings, "rows": results}, indent=2), encoding="utf-8")
lines = ["| | S | U | hIoU | S, PBC | U, PBC | hIoU, PBC | trainable |", "|---|---|---|---|---|---|---|---|"]
for name, title in TITLES.items():
    scores = [f"{value:.1f}" for readout in ("plain", "pbc") for value in results[name][readout].values()]
    share = f"{results[name]['trainable_percent']:.1f} %" if "trainable_percent" in results[name] else ""
    lines.append(f"| {title} | {' | '.join(scores)} | {share} |")
Markdown("\n".join(lines))
