// A photograph pasted anywhere on the page, unless into a field, goes where one is dropped.
() => document.addEventListener("paste", event => {
  const file = Array.from(event.clipboardData?.files ?? []).find(each => each.type.startsWith("image/"));
  const input = document.querySelector("#photograph input[type=file]");
  if (!file || !input) return;
  event.preventDefault();
  const files = new DataTransfer();
  files.items.add(file);
  input.files = files.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
})
