"use strict";
// What the page holds: numbers of all patches, where they lie, and words for them.
const data = JSON.parse(document.getElementById("data").textContent);
const numbers = data.numbers, layout = numbers.layout;
// Of synonyms the first one, where that says which class is meant.
const synonyms = numbers.model.class_names.map((name) => name.split(",")[0].trim());
const names = numbers.model.class_names.map((name, at) =>
  synonyms[at] && synonyms.filter((each) => each === synonyms[at]).length === 1 ? synonyms[at] : name);
const [height, width] = data.size, [gridHeight, gridWidth] = layout.grid;
const perWindow = gridHeight * gridWidth, windowColumns = layout.starts[1].length;
const numPatches = layout.windows * perWindow, numStages = numbers.patch.readings.length;
const byId = (id) => document.getElementById(id);
const state = { patch: numbers.patch.index, cursor: numbers.patch.index, overlay: "classes", only: null,
  highlight: [], map: null, rather: false, stage: -1,
  label: numbers.class ? numbers.class.id : numbers.patch.class };
if (!data.shown_classes.includes(state.label)) state.label = data.shown_classes[0];
let arrays, photo;

// Elements, text and numbers. Text only ever becomes text nodes.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.className = value;
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
const draw = (tag, attributes, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const percent = (share) => `${(100 * share).toFixed(share > 0.0995 ? 0 : 1)}\u00a0%`;
const points = (share) => (100 * share).toFixed(share > 0.0995 ? 0 : 1);
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const number = (value) => value.toFixed(3).replace("-", "−");
const rgb = (label) => `rgb(${data.colors[label].join(" ")})`;
function swatch(label) {
  const square = make("span", { class: "swatch", "aria-hidden": "true" });
  square.style.background = rgb(label);
  return square;
}
const named = (label) => make("span", { class: "named" }, swatch(label), names[label]);
const row = (tag, cells, attributes = {}) => make("tr", attributes, ...cells.map((each, at) =>
  each instanceof Node && /^T[HD]$/.test(each.tagName) ? each
    : make(at ? tag : "th", at ? {} : { scope: tag === "th" ? "col" : "row" }, each)));
function table(head, rows, caption, kind = "") {
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    make("table", { class: kind }, make("caption", { class: "hidden" }, caption),
      make("thead", {}, row("th", head)), make("tbody", {}, ...rows)));
}
const cell = (value) => make("td", { class: "number" }, value);
const stageName = (stage) => stage ? `after layer ${stage}` : numStages > 1 ? "before the layers" : "in the end";

// Numbers of all patches come deflated.
const TYPES = { float32: Float32Array, uint8: Uint8Array, uint16: Uint16Array, int16: Int16Array };
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (each) => each.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return { values: new TYPES[packed.dtype](await new Response(stream).arrayBuffer()), scale: packed.scale,
    shape: packed.shape };
}
const at = (array, index) => array.values[index] * array.scale;

// Places. A patch is its index among those of all windows.
const windowOf = (index) => Math.floor(index / perWindow);
const rowOf = (index) => Math.floor(index % perWindow / gridWidth);
const columnOf = (index) => index % gridWidth;
function patchAt(x, y) {
  const [rows, columns] = data.along;
  return (rows[0][y] * windowColumns + columns[0][x]) * perWindow + rows[1][y] * gridWidth + columns[1][x];
}
/** [left, top, width, height] on the picture of a block of a window's patches. */
function box(window, firstRow, firstColumn, size) {
  const top = layout.starts[0][Math.floor(window / windowColumns)] + firstRow * layout.patch;
  const left = layout.starts[1][window % windowColumns] + firstColumn * layout.patch;
  const [down, across] = [height / layout.resized[0], width / layout.resized[1]];
  const side = size * layout.patch;
  // Whole pixels: else seams show between neighbours.
  const [x, y] = [Math.round(left * across), Math.round(top * down)];
  return [x, y, Math.round((left + side) * across) - x, Math.round((top + side) * down) - y];
}
const patchBox = (index) => box(windowOf(index), rowOf(index), columnOf(index), 1);
function windowBox(window) {
  const [left, top] = box(window, 0, 0, 1);
  const [wide, high] = [layout.window[1] * width / layout.resized[1], layout.window[0] * height / layout.resized[0]];
  return [left, top, Math.min(wide, width - left), Math.min(high, height - top)];
}
/** Where the pixels lie that belong to a window, which overlapping ones share. */
function ownBox(window) {
  const range = (numbersAlong, wanted) => [numbersAlong.indexOf(wanted), numbersAlong.lastIndexOf(wanted) + 1];
  const [top, bottom] = range(data.along[0][0], Math.floor(window / windowColumns));
  const [left, right] = range(data.along[1][0], window % windowColumns);
  return [left, top, right - left, bottom - top];
}
function center(index) {
  const [left, top, wide, high] = patchBox(index);
  return [Math.min(width - 1, Math.floor(left + wide / 2)), Math.min(height - 1, Math.floor(top + high / 2))];
}
const placeText = (index) => `row ${rowOf(index) + 1}, column ${columnOf(index) + 1}` +
  (layout.windows > 1 ? ` of window ${windowOf(index) + 1}` : "");

// What was read for a patch.
const reading = (index, stage) => {
  const first = (index * numStages + stage) * 2;
  return { label: arrays.reading_classes.values[first], probability: at(arrays.reading_probabilities, first),
    second: arrays.reading_classes.values[first + 1], secondProbability: at(arrays.reading_probabilities, first + 1),
    own: at(arrays.label_probabilities, index * numStages + stage) };
};
const last = (index) => reading(index, numStages - 1);
const labelAt = (x, y) => arrays.labels.values[y * width + x];
const confidenceAt = (x, y) =>
  at(arrays.confidence, Math.floor(y / 2) * arrays.confidence.shape[1] + Math.floor(x / 2));
function spoken(index) {
  const read = last(index);
  return `${names[read.label]}, ${percent(read.probability)}; runner-up ${names[read.second]}, ` +
    `${percent(read.secondProbability)}; ${placeText(index)}`;
}
