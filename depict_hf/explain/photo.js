// Heads' maps: squares of a window's patches with their share of a token's attention, by layer and head.
function unfold(packed, token, tokens, size) {
  const squares = packed.maps.shape[4], [layers, heads] = packed.maps.shape.slice(2, 4);
  const across = Math.ceil(gridWidth / size);
  return Array.from({ length: layers }, (_, layer) => Array.from({ length: heads }, (_, head) => {
    const which = (token * layers + layer) * heads + head, peak = at(packed.peaks, which);
    const shares = Float64Array.from({ length: squares },
      (_, square) => peak * (packed.maps.values[which * squares + square] / data.maps.levels) ** 2);
    return { shares, peak, size, across, sum: at(packed.sums, which) };
  }));
}
function patchMaps(index) {
  if (index === numbers.patch.index)
    return numbers.patch.attention.map((heads) => heads.map((map) => {
      const shares = Float64Array.from(map.flat());
      const sum = shares.reduce((total, share) => total + share, 0);
      return { shares, peak: Math.max(...shares), size: 1, across: gridWidth, sum };
    }));
  const sharing = data.maps.sharing, across = Math.ceil(gridWidth / sharing);
  const blocks = Math.ceil(gridHeight / sharing) * across;
  const block = Math.floor(rowOf(index) / sharing) * across + Math.floor(columnOf(index) / sharing);
  return unfold(arrays.patchMaps, windowOf(index) * blocks + block, blocks, data.maps.square);
}
const classMaps = (label) => Array.from({ length: layout.windows }, (_, window) =>
  unfold(arrays.classMaps, window * data.shown_classes.length + data.shown_classes.indexOf(label), 0,
    data.maps.square));
/** What the maps of one head look at, largest share first: [[words, share], ...]. */
function lookedAt(maps) {
  const byLabel = new Map(), onClasses = "class tokens";
  // Nothing but patches is looked at in "ca", and the maps of "cbsa" do not sum to 1.
  const whole = ["sa", "mask_transformer"].includes(numbers.model.decoder_type);
  const total = whole ? maps.length : maps.reduce((sum, [, map]) => sum + map.sum, 0);
  for (const [window, map] of maps) {
    if (whole) byLabel.set(onClasses, (byLabel.get(onClasses) || 0) + Math.max(0, 1 - map.sum));
    const drawn = map.shares.reduce((sum, share) => sum + share, 0) || 1;
    map.shares.forEach((share, square) => {
      const rows = [], top = Math.floor(square / map.across) * map.size, left = square % map.across * map.size;
      for (let r = top; r < Math.min(top + map.size, gridHeight); r++)
        for (let c = left; c < Math.min(left + map.size, gridWidth); c++) rows.push(r * gridWidth + c);
      for (const patch of rows) {
        const label = last(window * perWindow + patch).label;
        byLabel.set(names[label], (byLabel.get(names[label]) || 0) + share / drawn * map.sum / rows.length);
      }
    });
  }
  return [...byLabel].map(([words, share]) => [words, total ? share / total : 0]).sort((a, b) => b[1] - a[1]);
}
function paintHeat(context, maps) {
  const peak = Math.max(...maps.map(([, map]) => map.peak));
  for (const [window, map, clip] of maps) {
    context.save();
    context.beginPath();
    context.rect(...clip);
    context.clip();
    map.shares.forEach((share, square) => {
      context.fillStyle = `rgb(255 178 30 / ${peak ? 0.92 * Math.sqrt(share / peak) : 0})`;
      context.fillRect(...box(window, Math.floor(square / map.across) * map.size, square % map.across * map.size,
        map.size));
    });
    context.restore();
  }
}
function chosenMaps(kind, layer, head) {
  if (kind === "patch") {
    const window = windowOf(state.patch);
    return [[window, patchMaps(state.patch)[layer][head], windowBox(window)]];
  }
  return classMaps(state.label).map((maps, window) => [window, maps[layer][head], ownBox(window)]);
}
function outline(context, rectangle, color, thick) {
  context.lineWidth = thick * 2;
  context.strokeStyle = "#000";
  context.strokeRect(...rectangle);
  context.lineWidth = thick;
  context.strokeStyle = color;
  context.strokeRect(...rectangle);
}
/** A button with a small picture of a head's map, which shows it on the photograph. */
function mapButton(kind, layer, head, maps, area) {
  const [left, top, wide, high] = area, scale = 200 / wide;
  const canvas = make("canvas", { width: 200, height: Math.max(1, Math.round(high * scale)), "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.translate(-left, -top);
  context.drawImage(photo, 0, 0, width, height);
  context.fillStyle = "rgb(10 12 30 / 0.5)";
  context.fillRect(0, 0, width, height);
  paintHeat(context, maps);
  if (kind === "patch") outline(context, patchBox(state.patch), "#fff", 1.2 / scale);
  const top2 = lookedAt(maps).slice(0, 2).filter(([, share]) => share >= 0.1);
  const text = top2.map(([words, share]) => `${words} ${percent(share)}`).join(", ");
  const button = make("button", { type: "button", "aria-pressed": "false", "data-layer": layer, "data-head": head,
    title: "Show on the photograph",
    onclick: () => { state.map = { kind, layer, head }; setOverlay("map"); } },
  canvas, make("span", {}, make("b", {}, `Head ${head + 1}`), make("span", { class: "hidden" },
    ` of layer ${layer + 1}`), text ? ` looks at ${text}` : " looks at many classes"));
  return button;
}
function markPressed() {
  for (const [id, kind] of [["heads", "patch"], ["class-body", "class"]])
    for (const button of byId(id).querySelectorAll(".maps button"))
      button.setAttribute("aria-pressed", String(state.overlay === "map" && state.map.kind === kind &&
        Number(button.dataset.layer) === state.map.layer && Number(button.dataset.head) === state.map.head));
}

// The photograph.
const veil = make("canvas", { width, height });
function paintVeil() {
  const context = veil.getContext("2d");
  context.clearRect(0, 0, width, height);
  if (state.overlay === "map" && state.map) {
    context.fillStyle = "rgb(10 12 30 / 0.7)";
    context.fillRect(0, 0, width, height);
    const maps = chosenMaps(state.map.kind, state.map.layer, state.map.head);
    if (state.map.kind === "patch") {
      context.clearRect(...windowBox(windowOf(state.patch)));
      context.fillStyle = "rgb(10 12 30 / 0.5)";
      context.fillRect(...windowBox(windowOf(state.patch)));
    }
    paintHeat(context, maps);
  } else if (state.overlay === "classes" || state.overlay === "doubt") {
    const image = context.createImageData(width, height);
    for (let y = 0, pixel = 0; y < height; y++)
      for (let x = 0; x < width; x++, pixel++) {
        const label = arrays.labels.values[pixel], doubt = state.overlay === "doubt";
        if (state.only !== null && label !== state.only) continue;
        const color = doubt ? [255, 0, 140] : data.colors[label];
        image.data.set([...color, doubt ? 255 * Math.min(1, 1.6 * (1 - confidenceAt(x, y))) : 255], 4 * pixel);
      }
    context.putImageData(image, 0, 0);
  }
}
function paint() {
  const context = byId("picture").getContext("2d");
  context.drawImage(photo, 0, 0, width, height);
  const opacity = Number(byId("opacity").value) / 100;
  // Where the slider stands at first, a head's map and doubts are seen well.
  context.globalAlpha = state.overlay === "classes" ? opacity : Math.min(1, opacity * 1.6);
  context.drawImage(veil, 0, 0);
  context.globalAlpha = 1;
  for (const index of state.highlight) outline(context, patchBox(index), "#fff", 0.7);
  if (layout.windows > 1 && state.overlay === "map" && state.map.kind === "patch")
    outline(context, windowBox(windowOf(state.patch)), "#ffd27a", 1.2);
  outline(context, patchBox(state.patch), "#fff", 2);
  if (state.cursor !== state.patch) outline(context, patchBox(state.cursor), "#7ff", 1.5);
}
const NOTES = {
  classes: "Each colour is a class; more opacity hides the photograph.",
  doubt: "The stronger the pink, the lower the probability of the class that the model chose there.",
  none: "The photograph as it is.",
};
function setOverlay(overlay) {
  state.overlay = overlay;
  state.highlight = [];
  const radio = document.querySelector(`input[name=overlay][value=${overlay}]`);
  radio.disabled = false;
  radio.checked = true;
  byId("overlay-note").textContent = overlay !== "map" ? NOTES[overlay]
    : `Layer ${state.map.layer + 1}, head ${state.map.head + 1}: the brighter, the more ` + (state.map.kind === "patch"
      ? `the chosen patch looks there. ${layout.windows > 1 ? "It sees its own window only, which is framed." : ""}`
      : `the token of ${names[state.label]} looks there.`);
  markPressed();
  paintVeil();
  paint();
}
function show(index, x, y) {
  const [cx, cy] = x === undefined ? center(index) : [x, y], label = labelAt(cx, cy);
  byId("readout").replaceChildren(named(label), ` ${percent(confidenceAt(cx, cy))} sure here. The patch: ${spoken(index)}.`);
}
function move(down, across) {
  const [left, top, wide, high] = patchBox(state.cursor);
  const x = Math.floor(left + wide / 2 + across * wide), y = Math.floor(top + high / 2 + down * high);
  if (x < 0 || y < 0 || x >= width || y >= height) {
    byId("live").textContent = `Edge of the photograph. ${spoken(state.cursor)}`;
    return;
  }
  state.cursor = patchAt(x, y);
  byId("live").textContent = spoken(state.cursor);
  show(state.cursor);
  paint();
}
function choose(index) {
  state.patch = state.cursor = index;
  state.rather = false;
  if (state.map && state.map.kind === "patch" && state.overlay === "map") paintVeil();
  show(index);
  explainPatch();
  byId("live").textContent = `Explained: ${spoken(index)}`;
  paint();
}
function chooseClass(label) {
  state.label = label;
  explainClass();
  if (state.overlay === "map" && state.map.kind === "class") setOverlay("map");
}
