// Lines of text, each with what kind it is. They are never markup, whatever names files and classes have.
function show() {
  const lines = (props.value || []).map(([kind, text]) => {
    const line = document.createElement(kind === "title" ? "h1" : "p");
    line.className = kind;
    line.textContent = text;
    return line;
  });
  element.querySelector(".lines").replaceChildren(...lines);
}

watch("value", show);
show();
