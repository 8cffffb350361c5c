// Draws the photograph with its classes. Opacity and switches work in the browser alone; what a pixel is, is asked for.
const STEPS = 40; // key presses across the longer side
const find = name => element.querySelector("." + name);
let shown = null; // what is on the canvas: value, photo and painted pixels, ids, hidden classes, place of the cursor
let opacity = 55; // stays from photograph to photograph
let requests = 0;
let waiting = 0;

function pixelsOf(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      resolve(context.getImageData(0, 0, canvas.width, canvas.height));
    };
    image.onerror = () => reject(new Error("The browser cannot decode the picture that the page was sent."));
    image.src = url;
  });
}

async function show() {
  const value = props.value;
  const request = ++requests;
  delete element.dataset.shown;
  if (!value) {
    shown = null;
    find("viewer").hidden = true;
    return;
  }
  const [photo, grey] = await Promise.all([pixelsOf(value.picture), pixelsOf(value.ids)]);
  if (request !== requests) return; // another photograph has come meanwhile
  const ids = new Uint8Array(photo.width * photo.height);
  for (let index = 0; index < ids.length; index++) ids[index] = grey.data[4 * index];
  const colors = new Map(value.classes.map(each => [each.id, each.color]));
  shown = { value, photo, ids, colors, hidden: new Set(), cursor: null };
  const picture = find("picture");
  [picture.width, picture.height] = [photo.width, photo.height];
  find("slider").value = opacity;
  find("legend").replaceChildren(...value.classes.map(entry));
  find("files").replaceChildren(...value.files.map(file));
  find("viewer").hidden = false;
  draw();
  element.dataset.shown = request;
}

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function entry({ id, name, color, share }) {
  const box = make("input", { type: "checkbox", checked: true });
  box.dataset.id = id;
  const swatch = make("span", { className: "swatch" });
  swatch.style.background = `rgb(${color.join(" ")})`;
  const percent = make("span", { className: "share" }, `${(100 * share).toFixed(1)} %`);
  return make("li", {}, make("label", {}, box, swatch, make("span", { className: "name" }, name), percent));
}

function file({ name, what, url }) {
  return make("li", {}, make("a", { href: url, download: name }, what));
}

function draw() {
  if (!shown) return;
  const { photo, ids, colors, hidden, cursor } = shown;
  const { width, height } = photo;
  const picture = find("picture");
  const context = picture.getContext("2d", { willReadFrequently: true });
  const painted = new ImageData(new Uint8ClampedArray(photo.data), width, height);
  const weight = opacity / 100;
  const visible = id => !hidden.has(id);
  for (let index = 0; index < ids.length; index++) {
    const id = ids[index];
    if (!visible(id)) continue;
    const color = colors.get(id);
    const right = (index + 1) % width ? ids[index + 1] : id;
    const below = index + width < ids.length ? ids[index + width] : id;
    // A dark line where a class ends, fading with the colours.
    const light = right !== id || below !== id ? 1 - 0.75 * Math.min(1, 2 * weight) : 1;
    for (let channel = 0; channel < 3; channel++) {
      const at = 4 * index + channel;
      painted.data[at] = light * (photo.data[at] + weight * (color[channel] - photo.data[at]));
    }
  }
  context.putImageData(painted, 0, 0);
  if (!cursor) return;
  const [x, y] = [((cursor.x + 0.5) / shown.value.width) * width, ((cursor.y + 0.5) / shown.value.height) * height];
  const size = Math.max(6, 10 * (width / (picture.clientWidth || width)));
  for (const [style, line] of [["black", size / 2], ["white", size / 5]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.beginPath();
    context.arc(x, y, size, 0, 2 * Math.PI);
    context.stroke();
  }
}

function read(x, y, delay) {
  const { width, height } = shown.value;
  shown.cursor = { x: Math.min(Math.max(x, 0), width - 1), y: Math.min(Math.max(y, 0), height - 1) };
  draw();
  clearTimeout(waiting);
  const { cursor } = shown;
  waiting = setTimeout(() => trigger("read", cursor), delay); // not for every key of many
}

element.addEventListener("click", event => {
  if (!shown) return;
  const all = event.target.dataset.all;
  if (event.target === find("picture")) {
    const box = event.target.getBoundingClientRect();
    const { width, height } = shown.value;
    read(
      Math.floor(((event.clientX - box.left) / box.width) * width),
      Math.floor(((event.clientY - box.top) / box.height) * height),
      0
    );
  } else if (all) {
    for (const box of element.querySelectorAll(".legend input")) box.checked = all === "on";
    switched();
  }
});

element.addEventListener("keydown", event => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Enter: [0, 0] };
  const move = moves[event.key];
  if (!shown || event.target !== find("picture") || !move) return;
  event.preventDefault();
  const { width, height } = shown.value;
  const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / STEPS));
  const from = shown.cursor || { x: Math.floor(width / 2), y: Math.floor(height / 2) };
  read(from.x + step * move[0], from.y + step * move[1], 150);
});

element.addEventListener("input", event => {
  if (event.target !== find("slider")) return;
  opacity = Number(event.target.value);
  draw();
});

element.addEventListener("change", event => {
  if (event.target.dataset.id !== undefined) switched();
});

function switched() {
  if (!shown) return;
  const boxes = Array.from(element.querySelectorAll(".legend input"));
  shown.hidden = new Set(boxes.filter(box => !box.checked).map(box => Number(box.dataset.id)));
  draw();
}

watch("value", show);
show();
