"use strict";
const get = (id) => document.getElementById(id);
let asked = 0;

async function ask(path, body) {
  const mine = ++asked; // an answer that comes after a later question is not shown
  get("note").hidden = false;
  get("note").textContent = "Working …";
  let found;
  try {
    const response = await fetch(path, { method: "POST", body, headers: { "Content-Type": "application/octet-stream" } });
    found = await response.json();
  } catch (error) {
    found = { error: "no answer; is r2kit demo still running, and the file not too large?" };
  }
  if (mine === asked) show(found);
}

function element(kind, name, text) {
  const made = document.createElement(kind);
  made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function show(found) {
  const words = found.error || found.note;
  get("note").hidden = !words;
  get("note").textContent = words || "";
  get("answer").hidden = Boolean(words);
  if (found.window) {
    const [left, top, width, height] = found.window.map((share) => `${100 * share}%`);
    Object.assign(get("window").style, { left, top, width, height });
    get("window").hidden = false;
  } else if (get("window")) {
    get("window").hidden = true;
  }
  if (words) return;
  get("what").textContent = found.what;
  get("rows").replaceChildren(
    ...found.rows.map(([name, share], place) => {
      const row = element("div", place ? "" : "main");
      const head = element("div", "bar-head");
      head.append(element("span", "", name), element("b", "", `${(100 * share).toFixed(1)} %`));
      const track = element("div", "track");
      const fill = element("div", "fill");
      fill.style.width = `${100 * share}%`;
      track.append(fill);
      row.append(head, track);
      return row;
    }),
  );
  get("pictures").replaceChildren(
    ...found.pictures.map(([url, caption]) => {
      const figure = element("figure", "");
      const image = element("img", "");
      image.src = url;
      image.alt = caption;
      figure.append(image, element("figcaption", "", caption));
      return figure;
    }),
  );
}

const drop = get("drop");
get("file").addEventListener("change", (event) => {
  if (event.target.files.length) ask("/image", event.target.files[0]);
});
for (const kind of ["dragenter", "dragover"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) ask("/image", event.dataTransfer.files[0]);
});
if (get("scene")) {
  get("scene").addEventListener("click", (event) => {
    const box = get("scene").getBoundingClientRect();
    const share = (value, start, length) => Math.min(1, Math.max(0, (value - start) / length));
    ask("/place", JSON.stringify({ x: share(event.clientX, box.left, box.width), y: share(event.clientY, box.top, box.height) }));
  });
}
