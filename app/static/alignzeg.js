// Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
// Segments a picture by class names in the browser. The two networks, tokenizer.json and alignzeg.json are what
// `scripts/export.py --browser` writes; onnxruntime-web runs them.

const LONGEST_SIDE = 1024; // larger pictures are reduced: the label map would cost memory and show no more

/** CLIP's byte-level BPE, from the contents of tokenizer.json. */
export class Tokenizer {
  constructor(json) {
    const { model, normalizer, pre_tokenizer: splitter, post_processor: ends } = json;
    const kinds = normalizer?.normalizers?.map((step) => step.type).join() ?? "";
    if (model?.type !== "BPE" || kinds !== "NFC,Replace,Lowercase" || ends?.type !== "RobertaProcessing") {
      throw new Error("tokenizer.json is not that of a CLIP. Export the model again.");
    }
    this.vocabulary = new Map(Object.entries(model.vocab));
    this.ranks = new Map(model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.suffix = model.end_of_word_suffix ?? "";
    this.unknown = this.vocabulary.get(model.unk_token);
    [this.start, this.end] = [ends.cls[1], ends.sep[1]];
    const [words, bytes] = splitter.pretokenizers;
    // \s of the tokenizers library is Unicode's white space, which that of JavaScript is not quite.
    this.words = new RegExp(words.pattern.Regex.replaceAll("\\s", "\\p{White_Space}"), "gu");
    this.pieces = bytes.use_regex ? /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\p{White_Space}\p{L}\p{N}]+/gu : null;
    this.characters = byteCharacters();
    this.cache = new Map();
  }

  /** Token ids of a text, with those of its start and end, at most `longest` of them. */
  encode(text, longest = Infinity) {
    const spaced = text.toWellFormed().normalize("NFC").replace(/\p{White_Space}+/gu, " ");
    const lower = Array.from(spaced, (character) => character.toLowerCase()).join("");
    const words = (lower.match(this.words) ?? []).flatMap((word) => (this.pieces ? word.match(this.pieces) : [word]));
    return [this.start, ...words.flatMap((word) => this.word(word)).slice(0, longest - 2), this.end];
  }

  word(word) {
    if (!this.cache.has(word)) {
      const symbols = Array.from(new TextEncoder().encode(word), (byte) => this.characters[byte]);
      symbols.push(symbols.pop() + this.suffix);
      this.cache.set(word, this.merge(symbols).map((symbol) => this.vocabulary.get(symbol) ?? this.unknown));
    }
    return this.cache.get(word);
  }

  merge(symbols) {
    while (symbols.length > 1) {
      const ranks = symbols.slice(1).map((right, index) => this.ranks.get(`${symbols[index]} ${right}`) ?? Infinity);
      const best = ranks.reduce((least, rank, index) => (rank < ranks[least] ? index : least), 0);
      if (ranks[best] === Infinity) break;
      symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
    }
    return symbols;
  }
}

/** GPT-2's printable character for every byte. */
function byteCharacters() {
  const isPrintable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte < 256 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(isPrintable(byte) ? byte : next++));
}

/** Class names of a text: separated by commas or line breaks, cleaned as the model was trained. */
export function parseNames(text) {
  const names = text
    .split(/[,\n]/)
    .map((name) => name.toWellFormed().replace(/[\p{Z}\p{Cc}]+/gu, " ").trim())
    .filter((name) => /[^\p{Cf} ]/u.test(name));
  const twice = names.find((name, index) => names.indexOf(name) < index);
  if (twice !== undefined) throw new Error(`The class name “${twice}” occurs twice. Remove one.`);
  if (names.length < 2) throw new Error("Write at least two class names, separated by commas: every pixel gets one.");
  return names;
}

/** Bytes of a file beside this page; `report` gets the count of new bytes. */
async function download(url, report) {
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new Error(`${url} could not be downloaded. Check the connection and reload the page.`);
  }
  if (!response.ok) {
    throw new Error(`${url} is missing (HTTP ${response.status}). Write it: scripts/export.py --browser app/static/models`);
  }
  const parts = [];
  for (let reader = response.body.getReader(), part; !(part = await reader.read()).done; ) {
    parts.push(part.value);
    report(part.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** Both networks, the tokenizer and the settings of a model folder. */
export class Segmenter {
  /** `report(share)` follows the download, from 0 to 1. */
  static async load(models, library, device, report) {
    const settings = await parseJson(`${models}alignzeg.json`);
    const total = Object.values(settings.bytes).reduce((sum, size) => sum + size);
    let done = 0;
    const fetchModel = (name) => download(models + name, (bytes) => report((done += bytes) / total));
    const [tokenizer, image, text] = await Promise.all([
      parseJson(`${models}tokenizer.json`),
      fetchModel("image.onnx"),
      fetchModel("text.onnx"),
    ]);
    const ort = await importLibrary(library, device);
    const options = { executionProviders: device === "webgpu" ? ["webgpu", "wasm"] : ["wasm"] };
    const segmenter = new Segmenter();
    Object.assign(segmenter, { ort, settings, tokenizer: new Tokenizer(tokenizer), prototypes: new Map() });
    segmenter.image = await ort.InferenceSession.create(image, options);
    segmenter.text = await ort.InferenceSession.create(text, { executionProviders: ["wasm"] });
    return segmenter;
  }

  isSeen(name) {
    return this.settings.classes.includes(name) && !this.settings.unseen.includes(name);
  }

  /** Unit vectors of class names, one tensor. */
  async textPrototypes(names) {
    const key = names.join("\n");
    if (!this.prototypes.has(key)) {
      const { templates, max_length: longest } = this.settings;
      const prompts = names.flatMap((name) => templates.map((template) => template.replaceAll("{}", () => name)));
      const encoded = prompts.map((prompt) => this.tokenizer.encode(prompt, longest));
      const length = Math.max(...encoded.map((ids) => ids.length));
      const ids = new BigInt64Array(encoded.length * length);
      encoded.forEach((tokens, row) => tokens.forEach((id, column) => (ids[row * length + column] = BigInt(id))));
      const input_ids = new this.ort.Tensor("int64", ids, [names.length, templates.length, length]);
      this.prototypes.set(key, (await this.text.run({ input_ids })).text_prototypes);
    }
    return this.prototypes.get(key);
  }

  /** Positions in `names` of the classes of all pixels of an ImageData: Int32Array, row by row. */
  async segment({ data, width, height }, names) {
    const rgb = new Uint8Array(width * height * 3);
    for (let from = 0, to = 0; from < data.length; from += 4, to += 3) rgb.set(data.subarray(from, from + 3), to);
    const seen = Uint8Array.from(names, (name) => this.isSeen(name));
    const { label_map: labels } = await this.image.run({
      image: new this.ort.Tensor("uint8", rgb, [1, height, width, 3]),
      text_prototypes: await this.textPrototypes(names),
      seen_class_mask: new this.ort.Tensor("bool", seen, [names.length]),
    });
    return labels.data;
  }
}

async function parseJson(url) {
  const text = new TextDecoder().decode(await download(url, () => {}));
  try {
    return JSON.parse(text);
  } catch {
    throw new Error(`${url} is not valid JSON. Export the model again.`);
  }
}

async function importLibrary(library, device) {
  try {
    const ort = await import(`${library}ort.${device}.min.mjs`);
    ort.env.wasm.wasmPaths = library;
    ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
    return ort;
  } catch {
    throw new Error(`onnxruntime-web could not be loaded from ${library}. Check the connection and reload the page.`);
  }
}

// --- the page ------------------------------------------------------------------------------------------------------

/** What the page shows. */
export const state = { segmenter: null, picture: null, names: [], labels: null, seconds: null };
const part = (id) => document.getElementById(id);
const setting = (name) => new URL(document.querySelector(`meta[name="${name}"]`).content, document.baseURI).href;
const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));

/** Runs an action; an error becomes a sentence on the page. */
async function attempt(action) {
  part("error").hidden = true;
  try {
    await action();
  } catch (error) {
    part("error").textContent = error.message || String(error);
    part("error").hidden = false;
    part("status").textContent = "";
    part("progress").hidden = true;
  }
  part("start").disabled = !(state.segmenter && state.picture);
}

async function loadModels() {
  const wanted = new URLSearchParams(location.search).get("device");
  const device = wanted === "webgpu" && (await navigator.gpu?.requestAdapter()) ? "webgpu" : "wasm";
  const bar = part("progress");
  bar.hidden = false;
  part("status").textContent = "Downloading the model…";
  state.segmenter = await Segmenter.load(setting("models"), setting("onnxruntime-web"), device, (share) => {
    bar.value = share;
    part("status").textContent = share < 1 ? `Downloading the model: ${Math.floor(100 * share)} %` : "Starting…";
  });
  bar.hidden = true;
  part("status").textContent = "Ready.";
}

async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${file.name || "The file"} is not a picture that this browser can read. Choose a JPEG or PNG.`);
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // behind transparent pixels
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  state.picture = context.getImageData(0, 0, width, height);
  URL.revokeObjectURL(part("preview").src);
  part("preview").src = URL.createObjectURL(file);
  part("preview").hidden = false;
  part("drop-text").hidden = true;
}

async function segmentPicture() {
  const names = parseNames(part("names").value);
  part("start").disabled = true;
  part("status").textContent = "Segmenting…";
  await painted(); // the network blocks the page
  const begin = performance.now();
  const picture = state.picture;
  const labels = await state.segmenter.segment(picture, names);
  const seconds = (performance.now() - begin) / 1000;
  Object.assign(state, { names, labels, shown: picture, seconds });
  part("status").textContent = `Segmented ${picture.width} × ${picture.height} pixels in ${seconds.toFixed(1)} s.`;
  part("result").hidden = false;
  drawMap();
  drawLegend();
}

const colorOf = (label) => state.segmenter.settings.colors[label % state.segmenter.settings.colors.length];

function paint(canvas, pixels) {
  [canvas.width, canvas.height] = [pixels.width, pixels.height];
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function drawMap() {
  const { labels, shown, names } = state;
  const share = Number(part("opacity").value);
  const colors = names.map((_, label) => colorOf(label));
  const mixed = new ImageData(new Uint8ClampedArray(shown.data), shown.width);
  for (let pixel = 0; pixel < labels.length; pixel++) {
    const color = colors[labels[pixel]];
    for (let channel = 0, at = 4 * pixel; channel < 3; channel++, at++) {
      mixed.data[at] = (1 - share) * mixed.data[at] + share * color[channel];
    }
  }
  paint(part("map"), mixed);
  part("map").style.width = `min(100%, ${(75 * shown.width) / shown.height}vh)`; // small pictures are enlarged
}

function drawLegend() {
  const counts = new Array(state.names.length).fill(0);
  for (const label of state.labels) counts[label]++;
  const order = [...counts.keys()].filter((label) => counts[label]).sort((one, other) => counts[other] - counts[one]);
  part("legend").replaceChildren(
    ...order.map((label) => {
      const [entry, chip, share] = ["li", "i", "span"].map((tag) => document.createElement(tag));
      entry.dataset.label = label;
      chip.style.background = `rgb(${colorOf(label).join()})`;
      const percent = (100 * counts[label]) / state.labels.length;
      share.textContent = percent < 1 ? "< 1 %" : `${Math.round(percent)} %`;
      entry.append(chip, state.names[label], share);
      return entry;
    }),
  );
}

function markClass(event) {
  const canvas = part("map");
  const x = Math.floor((event.offsetX / canvas.clientWidth) * canvas.width);
  const y = Math.floor((event.offsetY / canvas.clientHeight) * canvas.height);
  const label = event.type === "pointermove" ? state.labels[y * canvas.width + x] : -1;
  for (const entry of part("legend").children) entry.classList.toggle("under", Number(entry.dataset.label) === label);
}

function labelCanvas() {
  const { shown, labels } = state;
  if (state.names.length > 256) throw new Error("A grey PNG holds 256 classes at most. Use fewer names.");
  const grey = new ImageData(shown.width, shown.height);
  labels.forEach((label, pixel) => grey.data.set([label, label, label, 255], 4 * pixel));
  return paint(document.createElement("canvas"), grey);
}

async function save(canvas, name) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function connect() {
  const choose = (file) => file && attempt(() => readPicture(file));
  part("file").addEventListener("change", () => choose(part("file").files[0]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      part("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") choose(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
  part("form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(segmentPicture);
  });
  part("names").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!part("start").disabled) part("form").requestSubmit();
  });
  part("opacity").addEventListener("input", drawMap);
  for (const kind of ["pointermove", "pointerleave"]) part("map").addEventListener(kind, markClass);
  part("save-overlay").addEventListener("click", () => attempt(() => save(part("map"), "segmentation.png")));
  part("save-labels").addEventListener("click", () => attempt(() => save(labelCanvas(), "labels.png")));
  attempt(loadModels);
}

if (globalThis.document) connect();
