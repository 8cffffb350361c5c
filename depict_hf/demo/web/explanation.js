// The page of `depict explain` in a frame that knows nothing of this page.
let url = null;

function show() {
  const value = props.value;
  if (url) URL.revokeObjectURL(url);
  url = null;
  element.querySelector(".explanation").hidden = !value;
  element.querySelector(".frame").replaceChildren();
  if (!value) return;
  url = URL.createObjectURL(new Blob([value.page], { type: "text/html" }));
  Object.assign(element.querySelector(".save"), { href: url, download: value.name });
  // A new one each time: Chromium draws nothing in one that was hidden when its page came.
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "allow-scripts");
  frame.title = "How every part of the photograph came to its class";
  frame.srcdoc = value.page;
  element.querySelector(".frame").append(frame);
}

watch("value", show);
show();
