// Sections.
function fillHeader() {
  byId("name").textContent = numbers.photo.name;
  const top = numbers.classes.slice(0, 3).map((each) => `${names[each.id]} (${percent(each.share)})`).join(", ");
  byId("summary").textContent = `It sees mostly ${top}, and is ${percent(numbers.unsure.confidence)} sure on average.`;
  byId("picture").setAttribute("aria-label", `The photograph ${numbers.photo.name}, coloured by class: ${top}`);
  const buttons = numbers.classes.map((each) => make("li", {}, make("button", {
    type: "button", "aria-pressed": "false", "data-label": each.id, onclick: () => {
      state.only = state.only === each.id ? null : each.id;
      for (const button of byId("photograph").querySelectorAll("[data-label]"))
        button.setAttribute("aria-pressed", String(Number(button.dataset.label) === state.only));
      if (state.only !== null && data.shown_classes.includes(each.id)) chooseClass(each.id);
      if (state.overlay === "map" || state.overlay === "none") setOverlay("classes");
      paintVeil();
      paint();
    } }, swatch(each.id), `${names[each.id]} ${percent(each.share)}`)));
  const most = 16;
  byId("legend").replaceChildren(make("ul", {}, ...buttons.slice(0, most)));
  if (buttons.length > most)
    byId("legend").append(make("details", {}, make("summary", {}, `${buttons.length - most} smaller ones`),
      make("ul", {}, ...buttons.slice(most))));
}
function bar(value, most) {
  const fill = make("i");
  fill.style.left = "0";
  fill.style.width = `${100 * Math.min(1, value / most)}%`;
  return make("div", { class: "bar", "aria-hidden": "true" }, fill);
}
function signedBar(value, low, high) {
  const fill = make("i", { class: value < 0 ? "minus" : "" }), range = high - low || 1;
  fill.style.left = `${100 * (Math.min(0, value) - low) / range}%`;
  fill.style.width = `${100 * Math.abs(value) / range}%`;
  const element = make("div", { class: "bar signed", "aria-hidden": "true" }, fill);
  element.style.setProperty("--zero", `${100 * -low / range}%`);
  return element;
}
function explainPatch() {
  const index = state.patch, read = last(index), [x, y] = center(index), onMask = labelAt(x, y);
  const lead = read.probability - read.secondProbability;
  byId("verdict").replaceChildren(`The patch in ${placeText(index)} was read as `, make("strong", {}, named(read.label)),
    ` (${percent(read.probability)}). ${lead < numbers.unsure.margin ? "It was nearly" : "Next came"} `,
    make("strong", {}, named(read.second)), ` (${percent(read.secondProbability)}), ${points(lead)} percentage points behind.`);
  byId("pixel-note").textContent = onMask === read.label ? "" :
    `The mask says ${names[onMask]} in the middle of this patch: masks are blended between neighbouring patches` +
    (layout.windows > 1 ? ", and averaged where windows overlap." : ".");
  explainReadings(index, read);
  explainContributions(index, read);
  explainHeads(index);
  markPressed();
}
function explainReadings(index, read) {
  if (numStages === 1) {
    byId("readings").replaceChildren(make("p", {}, numbers.missing.attention));
    return;
  }
  let since = numStages - 1;
  while (since > 0 && reading(index, since - 1).label === read.label) since--;
  const sentence = since === 0 ? `It is ${names[read.label]} from the start: no layer changes that.`
    : `Layer ${since} turns it from ${names[reading(index, since - 1).label]} into ${names[read.label]}, which it stays.`;
  const rows = Array.from({ length: numStages }, (_, stage) => {
    const each = reading(index, stage);
    return row("td", [stageName(stage), named(each.label), cell(percent(each.probability)),
      make("td", { class: "bars" }, bar(each.own, 1)), cell(percent(each.own))]);
  });
  byId("readings").replaceChildren(make("p", {}, "This is what would be read if the model stopped after each layer. ",
    make("strong", {}, sentence), " Layers are trained together, not to be read one by one, so early readings can be odd."),
  table(["Read", "class", make("th", { scope: "col", class: "number" }, "probability"),
    make("th", { scope: "col", colspan: 2 }, `probability of ${names[read.label]}`)], rows,
  "Class read after each layer", "wide stages"));
}
function explainContributions(index, read) {
  const count = data.terms.length, term = (which, side) => at(arrays.contributions, (index * count + which) * 2 + side);
  const worth = (which) => term(which, 0) - (state.rather ? term(which, 1) : 0);
  const score = at(arrays.scores, index * 2) - (state.rather ? at(arrays.scores, index * 2 + 1) : 0);
  const groups = new Map();
  data.terms.forEach((each, which) => {
    const key = each.layer === null ? each.kind : each.layer;
    groups.set(key, [...(groups.get(key) || []), which]);
  });
  const KINDS = { encoder: "Encoder: what the picture shows here", input_bias: "Constant of the input",
    norm_bias: "Constant of the last normalisation", bias: "Constant of the class", mlp: "MLP",
    attention_bias: "constant of its attention", output_bias: "constant of its output" };
  const sums = [...groups].map(([key, members]) => [key, members, members.reduce((sum, each) => sum + worth(each), 0)]);
  const all = [0, ...sums.map(([, , sum]) => sum), ...data.terms.map((_, which) => worth(which)), score];
  const low = Math.min(...all), high = Math.max(...all);
  const line = (name, value, attributes) => row("td", [name, cell(signed(value)),
    make("td", { class: "bars" }, signedBar(value, low, high))], attributes);
  const rows = sums.flatMap(([key, members, sum]) => typeof key === "string" ? [line(KINDS[key] || key, sum)]
    : [line(`Layer ${key + 1}`, sum), ...members.map((which) => line(data.terms[which].kind === "head"
      ? `head ${data.terms[which].head + 1}` : KINDS[data.terms[which].kind] || data.terms[which].kind,
    worth(which), { class: "part" }))]);
  const quantity = numbers.patch.quantity === "cosine" ? "cosine" : "score";
  rows.push(line(state.rather ? "Lead" : `Sum: ${quantity}`, score, { class: "sum" }));
  const button = (rather, text) => make("button", { type: "button", "aria-pressed": String(state.rather === rather),
    onclick: () => {
      state.rather = rather;
      explainContributions(index, read);
      byId("contributions").querySelector('[aria-pressed="true"]').focus();
    } }, text);
  const what = quantity === "cosine" ? "how well the patch fits a class, as a cosine from −1 to 1" : "a class’s score";
  byId("contributions").replaceChildren(
    make("p", {}, `The bars split ${what}, into what the encoder and each layer and head add to it. Blue speaks for, ` +
      "orange against; together they make the sum in the last row. " + (quantity === "score" ? ""
        : "The class’s token and the normalisation are held fixed, so a bar is not what would be lost without that part.")),
    make("div", { class: "choice" }, button(false, `Why ${names[read.label]}?`),
      button(true, `Why ${names[read.label]} rather than ${names[read.second]}?`)),
    table(["Part", make("th", { scope: "col", class: "number" }, "adds"), ""], rows,
      state.rather ? `What speaks for ${names[read.label]} rather than ${names[read.second]}`
        : `What speaks for ${names[read.label]}`, "wide"));
}
function explainHeads(index) {
  if (!data.maps) {
    byId("heads").replaceChildren(make("p", {}, numbers.missing.attention));
    return;
  }
  const window = windowOf(index), area = windowBox(window), { sharing, square } = data.maps;
  const exact = index === numbers.patch.index;
  const coarse = exact ? "" : [sharing > 1 ? `A map is the average of the ${sharing} × ${sharing} patches around the ` +
    "chosen one" : "", square > 1 ? `its squares are ${square} × ${square} patches` : ""].filter(Boolean).join("; ");
  byId("heads").replaceChildren(make("p", {}, "In every layer each head lets the patch look at other patches and takes " +
    "something from them. Bright is where it looks most; each map has its own scale. Press a map to see it on the photograph."),
  make("p", { class: "note" }, coarse && `${coarse[0].toUpperCase()}${coarse.slice(1)}, to keep this page small.`),
  ...patchMaps(index).flatMap((heads, layer) => [make("h4", {}, `Layer ${layer + 1}`), make("div", { class: "maps" },
    ...heads.map((map, head) => mapButton("patch", layer, head, [[window, map, area]], area)))]));
}
function explainClass() {
  const label = state.label, found = numbers.classes.find((each) => each.id === label);
  const select = make("select", { id: "class-choice", onchange: (event) => {
    chooseClass(Number(event.target.value));
    byId("class-choice").focus();
  } }, ...data.shown_classes.map((each) => {
    const option = make("option", { value: each }, names[each]);
    option.selected = each === label;
    return option;
  }));
  const canvas = make("canvas", { width, height, role: "img", "aria-label":
    `Where ${names[label]} is read: ${found ? percent(found.share) : "0 %"} of the photograph` });
  const context = canvas.getContext("2d"), which = data.shown_classes.indexOf(label);
  context.drawImage(photo, 0, 0, width, height);
  context.fillStyle = "rgb(10 12 30 / 0.65)";
  context.fillRect(0, 0, width, height);
  for (let window = 0; window < layout.windows; window++) {
    context.save();
    context.beginPath();
    context.rect(...ownBox(window));
    context.clip();
    for (let patch = 0; patch < perWindow; patch++) {
      const index = window * perWindow + patch;
      context.fillStyle = `rgb(90 220 255 / ${0.85 * at(arrays.class_probabilities, index * data.shown_classes.length + which)})`;
      context.fillRect(...patchBox(index));
    }
    context.restore();
  }
  canvas.id = "class-picture";
  const body = [make("p", {}, numbers.missing.class_tokens ? "A class is found by weighing the numbers of every patch with its own weights. "
    : "A class is found by comparing its token, a list of numbers, with every patch. ",
    found ? `${names[label]} covers ${percent(found.share)} of the photograph, with ${percent(found.confidence)} ` +
      "probability on average." : `No pixel of the photograph became ${names[label]}.`),
  make("p", {}, make("label", { for: "class-choice" }, "Class: "), select),
  make("h3", {}, "Where it is read"), make("p", { class: "note" }, "The brighter, the more probable."), canvas];
  if (data.maps) {
    const windows = classMaps(label);
    body.push(make("h3", {}, "Where its token looks"), make("p", {}, "The token changes from layer to layer, too, by " +
      (numbers.model.decoder_type === "ca" ? "looking at patches."
        : "looking at patches and class tokens; a map shows what is left for patches, however little.") +
      (layout.windows > 1 ? " Every window of the photograph has a token of its own; here they are side by side." : "")));
    windows[0].forEach((heads, layer) => body.push(make("h4", {}, `Layer ${layer + 1}`), make("div",
      { class: "maps photos" }, ...heads.map((_, head) => mapButton("class", layer, head,
        windows.map((maps, window) => [window, maps[layer][head], ownBox(window)]), [0, 0, width, height])))));
  } else body.push(make("p", {}, numbers.missing.attention));
  byId("class-body").replaceChildren(...body);
  markPressed();
}
function fillUnsure() {
  const unsure = numbers.unsure;
  const calibrated = numbers.model.temperature !== 1;
  const body = [make("p", {}, `For ${percent(unsure.share)} of the photograph the first two classes lie less than ` +
    `${points(unsure.margin)} percentage points apart. ${calibrated ? "Probabilities were adjusted on labelled photographs (temperature " +
    `${numbers.model.temperature.toFixed(2)}).` : "Probabilities are the model’s own word: nothing has been adjusted to how often it is right."}`)];
  if (unsure.pairs.length) {
    const areas = ownedPatches();
    body.push(table(["Wavers between", make("th", { scope: "col", class: "number" }, "of the photograph"),
      make("th", { scope: "col", class: "number" }, "points apart"), ""], unsure.pairs.map((pair) => {
      const [first, second] = pair.classes;
      const pairRow = row("td", [make("span", {}, named(first), " and ", named(second)), cell(percent(pair.share)),
        cell(points(pair.margin)), make("button", { type: "button", onclick: () => {
          setOverlay("none");
          state.highlight = areas.filter((index) => {
            const read = last(index);
            return read.probability - read.secondProbability < unsure.margin &&
              Math.min(read.label, read.second) === first && Math.max(read.label, read.second) === second;
          });
          choose(pair.patch);
          byId("overlay-note").textContent =
            `Outlined is where the model wavers between ${names[first]} and ${names[second]}.`;
          byId("photograph").scrollIntoView({ block: "nearest" });
        } }, "Show", make("span", { class: "hidden" }, ` ${names[first]} and ${names[second]}`))]);
      return pairRow;
    }), "Classes that the model wavers between", "wide"),
    make("p", { class: "note" }, "Show outlines those patches on the photograph and explains the least sure of them."));
  } else body.push(make("p", {}, "No patch is that undecided."));
  byId("unsure-body").replaceChildren(...body);
}
/** Patches that some pixel of the picture belongs to. */
function ownedPatches() {
  const found = new Set();
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) found.add(patchAt(x, y));
  return [...found];
}
function fillRates() {
  const rates = numbers.rates;
  if (!rates) {
    byId("rates-body").replaceChildren(make("p", {}, numbers.missing.rates));
    return;
  }
  const stages = rates.patch_nats.length, own = rates.patch_compression_nats;
  const all = [...rates.patch_nats, ...(own || []).flat()], most = Math.max(...all) * 1.08;
  const x = (stage) => 52 + stage * 410 / Math.max(1, stages - 1), y = (nats) => 190 - nats / most * 165;
  const step = 10 ** Math.floor(Math.log10(most)), ticks = [];
  const gap = most / step < 2.5 ? step / 2 : most / step < 6 ? step : 2 * step;
  for (let tick = 0; tick <= most; tick += gap) ticks.push(tick);
  const label = (attributes, text) => draw("text", attributes, text);
  const chart = draw("svg", { class: "chart", viewBox: "0 0 500 215", role: "img", "aria-label": `Curve: ${rates.sentence}` },
    ...ticks.flatMap((tick) => [draw("line", { class: "grid", x1: 52, x2: 470, y1: y(tick), y2: y(tick) }),
      label({ x: 46, y: y(tick) + 4, "text-anchor": "end" }, String(Number(tick.toPrecision(6))))]),
    ...rates.patch_nats.map((_, stage) => label({ x: x(stage), y: 208, "text-anchor": "middle" },
      stage ? `layer ${stage}` : "start")),
    draw("polyline", { class: "curve", points: rates.patch_nats.map((nats, stage) => `${x(stage)},${y(nats)}`).join(" ") }),
    ...rates.patch_nats.map((nats, stage) => draw("circle", { class: "dot", cx: x(stage), cy: y(nats), r: 4 })),
    ...(own || []).flatMap(([before, after], layer) => [draw("line", { class: "own", x1: x(layer) + 8, y1: y(before),
      x2: x(layer + 1) - 8, y2: y(after) }), draw("rect", { class: "own-dot", x: x(layer + 1) - 12, y: y(after) - 4,
      width: 8, height: 8 })]),
    label({ x: 52, y: 14 }, "nats"));
  const rows = rates.patch_nats.map((nats, stage) => row("td", [stageName(stage), cell(nats.toFixed(1)),
    ...(own ? [cell(stage ? own[stage - 1][0].toFixed(1) : "–"), cell(stage ? own[stage - 1][1].toFixed(1) : "–")] : [])]));
  byId("rates-body").replaceChildren(make("p", {}, "The coding rate counts how much it takes to describe all patches up to " +
    "a fixed error: few nats mean that they resemble each other. " + (own ? "The theory behind this kind of decoder wants its layers to lower it, above all as their heads see it."
    : "The decoder of this model was not made to lower it.")),
  make("p", {}, make("strong", { id: "rate-sentence" }, rates.sentence)), chart,
  make("p", { class: "note" }, "Blue, round: all patches." + (own ? " Orange, square: as a layer’s heads see them, before and after its step." : "")),
  make("details", {}, make("summary", {}, "As a table"), table(["Read", make("th", { scope: "col", class: "number" },
    "all patches"), ...(own ? [make("th", { scope: "col", class: "number" }, "heads, before the step"),
    make("th", { scope: "col", class: "number" }, "after it")] : [])], rows, "Coding rates in nats")),
  make("p", { class: "note" }, `Tokens are scaled to length 1, the error is ${rates.epsilon}` +
    (layout.windows > 1 ? `, and rates are means over the ${layout.windows} windows.` : "."),
  own ? "" : ` ${numbers.missing.subspaces || ""}`));
}
function fillTokens() {
  const tokens = numbers.class_tokens;
  if (!tokens) {
    byId("tokens-body").replaceChildren(make("p", {}, numbers.missing.class_tokens));
    return;
  }
  const stage = state.stage < 0 ? tokens.stages.length - 1 : state.stage, gram = tokens.gram[stage];
  const select = make("select", { id: "stage-choice", onchange: (event) => {
    state.stage = Number(event.target.value);
    fillTokens();
    byId("stage-choice").focus();
  } }, ...tokens.stages.map((name, each) => {
    const option = make("option", { value: each }, name);
    option.selected = each === stage;
    return option;
  }));
  const rows = tokens.classes.map((label, first) => row("td", [named(label), ...gram[first].map((value) => {
    const element = make("td", {}, value.toFixed(2).replace("-", "−"));
    element.style.background = `rgb(var(--${value < 0 ? "minus" : "plus"}-tint) / ${0.5 * Math.abs(value)})`;
    return element;
  })]));
  byId("tokens-body").replaceChildren(make("p", {}, "Each number is the cosine of two classes’ tokens: 1 is the same direction, " +
    "0 is nothing in common, below 0 they are opposed. Tokens that are alike give a patch similar scores."),
  make("p", {}, make("strong", {}, tokens.sentence)),
  make("p", {}, make("label", { for: "stage-choice" }, "Tokens: "), select),
  table(["", ...tokens.classes.map((label) => names[label])], rows, "Cosines of class tokens", "gram"),
  make("p", { class: "note" }, `Distance from fully separate tokens, all ${names.length} classes: ` +
    `${tokens.deviation[stage].toFixed(2)} (0: perpendicular).` +
    (tokens.classes.length < names.length ? " The table has the classes of this photograph." : "")));
}
function fillSubspaces() {
  const found = numbers.subspaces;
  if (!found) {
    byId("subspaces-body").replaceChildren(make("p", {}, numbers.missing.subspaces));
    return;
  }
  const negative = found.flatMap((each) => each.step_sizes).filter((each) => each < 0).length;
  const total = found.flatMap((each) => each.step_sizes).length;
  // In "cbsa" a matrix of its own stands between the heads and the tokens, which may turn directions around.
  const plain = numbers.model.decoder_type !== "cbsa";
  const signs = negative === total ? `All step sizes are negative${plain ? ": layers take away what their heads gathered." : "."}`
    : negative === 0 ? `All step sizes are positive${plain ? ": layers add what their heads gathered." : "."}`
      : `Step sizes differ in sign${plain ? ": some layers add what their heads gathered, some take it away." : "."}`;
  const overlap = (value) => value === null ? "–" : value.toFixed(2);
  byId("subspaces-body").replaceChildren(make("p", {}, "Each head sees the patches through a subspace, a few of all the " +
    "directions that numbers can vary in. In theory a head’s directions are perpendicular (deviation 0), and heads share none " +
    "(overlap 0). In brackets: random directions. ", make("strong", {}, signs)),
  table(["Layer", ...["step size", "deviation", "overlap", "directions used"].map((text) =>
    make("th", { scope: "col", class: "number" }, text))], found.map((each) => row("td",
    [`${each.part === "cross" ? "cross-attention " : ""}${each.layer + 1}`,
      cell([...new Set(each.step_sizes.map(number))].join(", ")),
      cell(`${each.deviation.toFixed(2)} (${each.random_deviation.toFixed(2)})`),
      cell(`${overlap(each.overlap)} (${overlap(each.random_overlap)})`),
      cell(`${each.effective_rank.toFixed(0)} (${each.random_effective_rank.toFixed(0)})`)])),
  "Subspaces of the heads by layer", "wide"));
}
function fillAbout() {
  const entry = (term, text) => [make("dt", {}, term), make("dd", {}, text)];
  const coarse = data.maps && (data.maps.sharing > 1 || data.maps.square > 1);
  byId("about-body").replaceChildren(make("dl", {},
    ...entry("Model", `Decoder “${numbers.model.decoder_type}” with ${numbers.model.layers} layers of ${numbers.model.heads} ` +
      `heads and ${names.length} classes.`),
    ...entry("Windows", layout.windows > 1 ? `The photograph is resized to ${layout.resized[1]} × ${layout.resized[0]} pixels and ` +
      `seen in ${layout.windows} windows of ${layout.window[1]} × ${layout.window[0]}. A patch is explained within the window ` +
      "whose centre is nearest; where windows overlap, the mask averages them." : "The model sees the photograph as a whole, " +
      `resized to ${layout.resized[1]} × ${layout.resized[0]} pixels.`),
    ...entry("Patches", `Squares of ${layout.patch} × ${layout.patch} of those pixels. The mask is blended between patches, so it can ` +
      "differ from a patch’s class near borders."),
    ...(coarse ? entry("Coarse maps", `To keep this page small, ${data.maps.sharing ** 2} neighbouring patches share their heads’ maps, ` +
      `which consist of squares of ${data.maps.square} × ${data.maps.square} patches. The patch with which this page opened has its ` +
      "own, at full detail; depict explain --at X Y chooses it.") : []),
    ...entry("Numbers", "Layers, heads, rows and columns are counted from 1 here, and from 0 in depict explain --json and in depict_hf.analysis.")));
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("This page needs a browser of 2023 or later.");
  photo = new Image();
  photo.src = data.photo;
  const packed = Object.entries(data).filter(([, value]) => value && value.data);
  arrays = Object.fromEntries(await Promise.all(packed.map(async ([key, value]) => [key, await unpack(value)])));
  for (const [key, kind] of data.maps ? [["patchMaps", "patches"], ["classMaps", "classes"]] : [])
    arrays[key] = { maps: await unpack(data.maps[kind].maps), peaks: await unpack(data.maps[kind].peaks),
      sums: await unpack(data.maps[kind].sums) };
  await photo.decode();
  Object.assign(byId("picture"), { width, height });
  fillHeader();
  fillUnsure();
  fillRates();
  fillTokens();
  fillSubspaces();
  fillAbout();
  explainClass();
  setOverlay("classes");
  choose(state.patch);
  const picture = byId("picture");
  const pixel = (event) => {
    const area = picture.getBoundingClientRect();
    return [Math.min(width - 1, Math.max(0, Math.floor((event.clientX - area.left) / area.width * width))),
      Math.min(height - 1, Math.max(0, Math.floor((event.clientY - area.top) / area.height * height)))];
  };
  picture.addEventListener("mousemove", (event) => show(patchAt(...pixel(event)), ...pixel(event)));
  picture.addEventListener("mouseleave", () => show(state.cursor));
  byId("grid").addEventListener("click", (event) => {
    state.highlight = [];
    // A click by keyboard has no place of its own.
    choose(event.detail === 0 ? state.cursor : patchAt(...pixel(event)));
  });
  byId("grid").addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move(...steps[event.key]);
  });
  byId("opacity").addEventListener("input", paint);
  for (const radio of document.querySelectorAll("input[name=overlay]"))
    radio.addEventListener("change", () => setOverlay(radio.value));
  document.body.dataset.ready = "true";
}
start().catch((error) => {
  byId("problem").textContent = `This page could not be drawn: ${error.message}`;
  byId("problem").hidden = false;
});
