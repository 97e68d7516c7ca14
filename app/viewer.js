// Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
// Draws what `view_data` of app.py sends: label maps as runs, the unseen-ness map, and one row per class.
// gr.HTML provides `element`, `props` and `watch`. Names reach the page as text only, never as markup.

const pack = (red, green, blue, alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0; // as in ImageData
const BORDER = pack(255, 255, 255, 235);
const HEAT = [[13, 26, 74], [32, 106, 140], [64, 176, 120], [253, 231, 37]]; // dark to light: seen to unseen
const part = (name) => element.querySelector(`[data-part="${name}"]`);
const decoded = new Map(); // base64 text of a map to its bytes; a view switch or a hover decodes nothing again
let highlighted = null;
let repaint = [];
let shown = "";

function create(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function labelMap(map, size) {
  const key = map.ids + "/" + map.runs;
  if (!decoded.has(key)) {
    if (decoded.size > 8) decoded.clear();
    const labels = new Uint8Array(size);
    const runs = new DataView(bytes(map.runs).buffer);
    let position = 0;
    bytes(map.ids).forEach((id, index) => {
      const end = position + runs.getUint32(4 * index, true);
      labels.fill(id, position, end);
      position = end;
    });
    decoded.set(key, labels);
  }
  return decoded.get(key);
}

function percent(value) {
  return value > 0 && value < 0.001 ? "< 0.1 %" : `${(100 * value).toFixed(1)} %`;
}

function setTip(event, text) {
  const tip = part("tip");
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.max(event.clientY - tip.offsetHeight - 10, 4)}px`;
}

function highlight(id) {
  if (id === highlighted) return;
  highlighted = id;
  repaint.forEach((paint) => paint());
  part("body").querySelectorAll("tr").forEach((row) => row.classList.toggle("az-active", Number(row.dataset.id) === id));
}

// The picture under a canvas; `paint(canvas)` draws, `describe(column, row)` names a pixel and its class.
function addPanel(value, caption, paint, describe) {
  const figure = create("figure");
  if (caption) figure.append(create("figcaption", "", caption));
  const frame = create("div", "az-frame");
  const picture = create("img");
  picture.src = value.picture.url;
  picture.alt = "the picture that is segmented";
  const canvas = create("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${caption || "Segmentation"}; the table below lists the classes`);
  frame.append(picture, canvas);
  frame.classList.toggle("az-small", Math.max(value.width, value.height) < 320);
  figure.append(frame);
  part("stage").append(figure);
  repaint.push(() => paint(canvas));
  picture.addEventListener("load", () => paint(canvas)); // now its size on the page is known
  paint(canvas);
  const move = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * value.width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * value.height);
    if (column < 0 || row < 0 || column >= value.width || row >= value.height) return;
    const { id, text } = describe(column, row);
    setTip(event, text);
    highlight(id);
  };
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerdown", move);
  canvas.addEventListener("pointerleave", () => {
    setTip(null, "");
    highlight(null);
  });
}

function paintLabels(canvas, value, labels) {
  const { width, height, classes } = value;
  const zoom = Math.max(1, Math.ceil(640 / Math.max(width, height))); // fine borders on small pictures
  canvas.width = width * zoom;
  canvas.height = height * zoom;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const palette = classes.map(({ color }, id) => {
    return pack(...color, highlighted === null ? 165 : highlighted === id ? 205 : 40);
  });
  const pixels = new Uint32Array(image.data.buffer);
  for (let y = 0, offset = 0; y < canvas.height; y++) {
    const row = Math.floor(y / zoom) * width;
    const below = Math.min(Math.floor((y + 1) / zoom), height - 1) * width;
    for (let x = 0; x < canvas.width; x++, offset++) {
      const column = Math.floor(x / zoom);
      const right = Math.min(Math.floor((x + 1) / zoom), width - 1);
      const id = labels[row + column];
      pixels[offset] = id === labels[row + right] && id === labels[below + column] ? palette[id] : BORDER;
    }
  }
  context.putImageData(image, 0, 0);
  writeNames(canvas, context, value, labels, zoom);
}

// Every class is named where it is widest, as far as its name fits there.
function writeNames(canvas, context, value, labels, zoom) {
  const runs = new Map(); // id to [length, column, row] of its runs
  for (let row = 0; row < value.height; row++) {
    for (let start = 0, column = 1; column <= value.width; column++) {
      const id = labels[row * value.width + start];
      if (column < value.width && labels[row * value.width + column] === id) continue;
      if (!runs.has(id)) runs.set(id, []);
      runs.get(id).push([column - start, start, row]);
      start = column;
    }
  }
  const shownWidth = canvas.clientWidth || canvas.width;
  const size = ((shownWidth < 400 ? 11 : 13) * canvas.width) / shownWidth;
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  runs.forEach((list, id) => {
    const widest = list.reduce((most, [length]) => Math.max(most, length), 0);
    const wide = list.filter(([length]) => length >= 0.9 * widest);
    const [length, column, row] = wide[wide.length >> 1];
    const name = value.classes[id].name;
    const space = context.measureText(name).width + size;
    if (space > length * zoom || (highlighted !== null && highlighted !== id)) return;
    const x = (column + length / 2) * zoom;
    const y = Math.min(Math.max((row + 0.5) * zoom, size), canvas.height - size);
    context.fillStyle = "rgba(17, 24, 39, 0.78)";
    context.beginPath();
    context.roundRect(x - space / 2, y - 0.75 * size, space, 1.5 * size, size / 3);
    context.fill();
    context.fillStyle = "white";
    context.fillText(name, x, y);
  });
}

function paintHeat(canvas, map) {
  canvas.width = map.width;
  canvas.height = map.height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(map.width, map.height);
  const pixels = new Uint32Array(image.data.buffer);
  bytes(map.values).forEach((level, index) => {
    const position = (level / 255) * (HEAT.length - 1);
    const low = Math.min(Math.floor(position), HEAT.length - 2);
    const color = HEAT[low].map((from, channel) => Math.round(from + (HEAT[low + 1][channel] - from) * (position - low)));
    pixels[index] = pack(...color, 190);
  });
  context.putImageData(image, 0, 0);
}

function describeLabel(value, labels, column, row) {
  const id = labels[row * value.width + column];
  const entry = value.classes[id];
  return { id, text: entry.name + (entry.unseen ? " (unseen)" : "") };
}

function addLabelPanel(value, result, caption) {
  const labels = labelMap(result.labels, value.width * value.height);
  addPanel(value, caption, (canvas) => paintLabels(canvas, value, labels), (column, row) => {
    return describeLabel(value, labels, column, row);
  });
}

function addHeatPanel(value) {
  const map = value.unseen_map;
  const values = bytes(map.values);
  const labels = labelMap(value.corrected.labels, value.width * value.height);
  addPanel(value, "", (canvas) => paintHeat(canvas, map), (column, row) => {
    const x = Math.floor((column * map.width) / value.width);
    const y = Math.floor((row * map.height) / value.height);
    const level = values[y * map.width + x] / 255;
    const { id, text } = describeLabel(value, labels, column, row);
    return { id, text: `unseen-ness ${level.toFixed(2)}: ${text}` };
  });
}

function fillTable(value, compare) {
  const head = create("tr");
  const titles = compare ? ["Class", "Without", "With"] : ["Class", "Coverage", "Confidence"];
  titles.forEach((title) => head.append(create("th", "", title)));
  part("head").replaceChildren(head);
  const before = new Map(value.plain.rows.map(([id, coverage]) => [id, coverage]));
  const rows = [...value.corrected.rows];
  if (compare) {
    const present = new Set(rows.map(([id]) => id));
    value.plain.rows.forEach(([id]) => present.has(id) || rows.push([id, 0, 0]));
  }
  part("body").replaceChildren(
    ...rows.map(([id, coverage, confidence]) => {
      const entry = value.classes[id];
      const row = create("tr");
      row.dataset.id = id;
      row.tabIndex = 0;
      const name = create("div", "az-name");
      const swatch = create("span", "az-swatch");
      swatch.style.backgroundColor = `rgb(${entry.color.join(",")})`;
      name.append(swatch, create("span", "az-label", entry.name));
      if (entry.unseen) name.append(create("span", "az-badge", "unseen"));
      const cell = create("td");
      cell.append(name);
      row.append(cell);
      if (compare) row.append(create("td", "az-number", percent(before.get(id) ?? 0)));
      const share = create("td", "az-number");
      const bar = create("span", "az-bar");
      bar.style.width = `${100 * coverage}%`;
      bar.hidden = coverage === 0;
      bar.style.backgroundColor = swatch.style.backgroundColor;
      share.append(create("span", "", percent(coverage)), bar);
      row.append(share);
      if (!compare) row.append(create("td", "az-number", percent(confidence)));
      row.addEventListener("pointerenter", () => highlight(id));
      row.addEventListener("pointerleave", () => highlight(null));
      row.addEventListener("focus", () => highlight(id));
      row.addEventListener("blur", () => highlight(null));
      return row;
    })
  );
  const found = new Set(rows.map(([id]) => id));
  const absent = value.classes.filter((entry, id) => !found.has(id) && !entry.extra).map((entry) => entry.name);
  part("absent").textContent = absent.length ? `Not found: ${absent.join(", ")}` : "";
}

function draw() {
  const value = props.value;
  const isResult = Boolean(value && value.classes);
  part("empty").hidden = isResult;
  part("result").hidden = !isResult;
  setTip(null, "");
  if (!isResult) return;
  const unseenView = element.querySelector('input[value="unseen"]');
  unseenView.disabled = !value.unseen_map;
  if (unseenView.disabled && unseenView.checked) element.querySelector('input[value="segmentation"]').checked = true;
  const view = element.querySelector("input:checked").value;
  highlighted = null;
  repaint = [];
  part("stage").replaceChildren();
  part("stage").dataset.view = view;
  if (view === "unseen") {
    addHeatPanel(value);
  } else if (view === "compare") {
    addLabelPanel(value, value.plain, "Without correction");
    addLabelPanel(value, value.corrected, value.correction);
  } else {
    addLabelPanel(value, value.corrected, "");
  }
  part("scale").hidden = view !== "unseen";
  part("hint").textContent = value.hint;
  fillTable(value, view === "compare");
  const result = part("result");
  result.dataset.view = view;
  result.dataset.gamma = value.gamma;
  result.dataset.threshold = value.threshold;
  result.dataset.drawn = Number(result.dataset.drawn || 0) + 1;
  if (shown !== value.picture.url && window.innerWidth < 640) element.scrollIntoView({ behavior: "smooth" });
  shown = value.picture.url;
}

part("views").addEventListener("change", draw);
watch("value", draw);
draw();
