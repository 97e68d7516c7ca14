// Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
// Draws what `view_data` of app.py sends: label maps as runs, the unseen-ness map, and one row per class.
// gr.HTML provides `element`, `props` and `watch`. Names reach the page as text only, never as markup.

const pack = (red, green, blue, alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0; // as in ImageData
const BORDER = pack(255, 255, 255, 235);
const HEAT = [[13, 26, 74], [32, 106, 140], [64, 176, 120], [253, 231, 37]]; // dark to light: seen to unseen
const part = (name) => element.querySelector(`[data-part="${name}"]`);
const decoded = new Map(); // base64 text of a map to its bytes; a view switch or a hover decodes nothing again
let value = null; // what is drawn
let shown = {}; // its view and picture
let panels = [];
let highlighted = null; // the id of a class

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

function percent(share) {
  return share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
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
  panels.forEach(paint);
  part("body").querySelectorAll("tr").forEach((row) => row.classList.toggle("az-active", Number(row.dataset.id) === id));
}

// The picture under a canvas. `kind` is what the canvas shows: "plain", "corrected" or "unseen".
function createPanel(kind) {
  const panel = { kind, figure: create("figure"), caption: create("figcaption"), canvas: create("canvas") };
  const frame = create("div", "az-frame");
  const picture = create("img");
  picture.src = value.picture.url;
  picture.alt = "the picture that is segmented";
  picture.addEventListener("load", () => paint(panel)); // now its size on the page is known
  panel.canvas.setAttribute("role", "img");
  frame.append(picture, panel.canvas);
  frame.classList.toggle("az-small", value.small);
  panel.figure.append(panel.caption, frame);
  const move = (event) => {
    const box = panel.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * value.width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * value.height);
    if (column < 0 || row < 0 || column >= value.width || row >= value.height) return;
    const id = panel.labels[row * value.width + column];
    const entry = value.classes[id];
    setTip(event, unseenness(panel, column, row) + entry.name + (entry.unseen ? " (unseen)" : ""));
    highlight(id);
  };
  panel.canvas.addEventListener("pointermove", move);
  panel.canvas.addEventListener("pointerdown", move);
  panel.canvas.addEventListener("pointerleave", () => {
    setTip(null, "");
    highlight(null);
  });
  return panel;
}

function unseenness(panel, column, row) {
  if (panel.kind !== "unseen") return "";
  const map = value.unseen_map;
  const x = Math.floor((column * map.width) / value.width);
  const y = Math.floor((row * map.height) / value.height);
  return `unseen-ness ${(panel.levels[y * map.width + x] / 255).toFixed(2)}: `;
}

function updatePanel(panel, compare) {
  const name = panel.kind === "plain" ? "Without correction" : value.correction;
  panel.caption.textContent = compare ? name : "";
  panel.canvas.setAttribute("aria-label", `${compare ? name : "Segmentation"}; the table below lists the classes`);
  panel.labels = labelMap(value[panel.kind === "plain" ? "plain" : "corrected"].labels, value.width * value.height);
  if (panel.kind === "unseen") panel.levels = bytes(value.unseen_map.values);
  paint(panel);
}

function paint(panel) {
  if (panel.kind === "unseen") paintHeat(panel.canvas, value.unseen_map, panel.levels);
  else paintLabels(panel.canvas, panel.labels);
}

function paintLabels(canvas, labels) {
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
  for (let row = 0; row < height; row++) {
    const above = row * zoom * canvas.width; // the first line of this row, the next ones repeat it
    for (let column = 0; column < width; column++) {
      const id = labels[row * width + column];
      const end = above + (column + 1) * zoom;
      pixels.fill(palette[id], end - zoom, end);
      if (column + 1 < width && labels[row * width + column + 1] !== id) pixels[end - 1] = BORDER;
    }
    for (let line = 1; line < zoom; line++) pixels.copyWithin(above + line * canvas.width, above, above + canvas.width);
    const last = above + (zoom - 1) * canvas.width;
    for (let column = 0; row + 1 < height && column < width; column++) {
      if (labels[row * width + column] === labels[(row + 1) * width + column]) continue;
      pixels.fill(BORDER, last + column * zoom, last + (column + 1) * zoom);
    }
  }
  context.putImageData(image, 0, 0);
  writeNames(canvas, context, labels, zoom);
}

// Every class is named where it is widest, as far as its name fits there.
function writeNames(canvas, context, labels, zoom) {
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

function paintHeat(canvas, map, levels) {
  canvas.width = map.width;
  canvas.height = map.height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(map.width, map.height);
  const pixels = new Uint32Array(image.data.buffer);
  levels.forEach((level, index) => {
    const position = (level / 255) * (HEAT.length - 1);
    const low = Math.min(Math.floor(position), HEAT.length - 2);
    const color = HEAT[low].map((from, channel) => Math.round(from + (HEAT[low + 1][channel] - from) * (position - low)));
    pixels[index] = pack(...color, 190);
  });
  context.putImageData(image, 0, 0);
}

function fillTable(compare) {
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
      const label = create("div");
      label.append(create("span", "az-label", entry.name));
      if (entry.unseen) label.append(create("span", "az-badge", "unseen"));
      name.append(swatch, label);
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
  const list = absent.length > 24 ? `the other ${absent.length} names` : absent.join(", ");
  part("absent").textContent = list && `Not found: ${list}`;
}

function draw() {
  value = props.value;
  const isResult = Boolean(value && value.classes);
  part("empty").hidden = isResult;
  part("result").hidden = !isResult;
  setTip(null, "");
  if (!isResult) return;
  const unseenView = element.querySelector('input[value="unseen"]');
  unseenView.disabled = !value.unseen_map;
  if (unseenView.disabled && unseenView.checked) element.querySelector('input[value="segmentation"]').checked = true;
  const view = element.querySelector("input:checked").value;
  const isNew = shown.picture !== value.picture.url;
  highlighted = null;
  if (isNew || shown.view !== view) {
    const kinds = { segmentation: ["corrected"], compare: ["plain", "corrected"], unseen: ["unseen"] };
    panels = kinds[view].map(createPanel);
    part("stage").dataset.view = view;
    part("stage").replaceChildren(...panels.map((panel) => panel.figure));
    part("scale").hidden = view !== "unseen";
  }
  shown = { view, picture: value.picture.url };
  panels.forEach((panel) => updatePanel(panel, view === "compare"));
  part("hint").textContent = value.hint;
  fillTable(view === "compare");
  const result = part("result");
  const { gamma, threshold, everything_else } = value;
  Object.assign(result.dataset, { view, gamma, threshold, everythingElse: everything_else });
  result.dataset.drawn = Number(result.dataset.drawn || 0) + 1;
  if (isNew && window.innerWidth < 640) element.scrollIntoView({ behavior: "smooth" });
}

part("views").addEventListener("change", draw);
watch("value", draw);
draw();
