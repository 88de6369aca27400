// The large view of one image: the original photograph and label where they are found, else the thumbnails.

const MAX_PIXELS = 50e6; // larger originals are too slow for a browser
const SWIPE_PX = 50;
const viewer = { at: 0, opacity: 60, before: 60 };
const PARTS = [["score", "Scores"], ["mask", "Masks"], ["disagreement", "Tags against boxes"], ["void", "Void"]];

function startViewer() {
  const dialog = find("viewer");
  for (const id of ["opacity", "viewer-opacity"]) find(id).addEventListener("input", (event) => setOpacity(Number(event.target.value)));
  find("viewer-close").addEventListener("click", () => dialog.close());
  find("viewer-previous").addEventListener("click", () => showImage(viewer.at - 1));
  find("viewer-next").addEventListener("click", () => showImage(viewer.at + 1));
  find("show-boxes").addEventListener("change", drawBoxes);
  dialog.addEventListener("close", () => focusCard(viewer.at));
  let from = null;
  const stage = dialog.querySelector(".frame");
  stage.addEventListener("touchstart", (event) => { from = event.touches.length === 1 ? event.touches[0].clientX : null; }, { passive: true });
  stage.addEventListener("touchend", (event) => {
    const moved = from === null ? 0 : event.changedTouches[0].clientX - from;
    if (Math.abs(moved) > SWIPE_PX) showImage(viewer.at - Math.sign(moved));
  }, { passive: true });
  setOpacity(viewer.opacity);
}

function setOpacity(value) {
  viewer.opacity = Math.min(Math.max(value, 0), 100);
  document.documentElement.style.setProperty("--opacity", viewer.opacity / 100);
  for (const id of ["opacity", "viewer-opacity"]) {
    find(id).value = viewer.opacity;
    find(id).parentElement.querySelector("output").value = `${viewer.opacity} %`;
  }
}

function toggleLabel() {
  if (viewer.opacity) [viewer.before, viewer.opacity] = [viewer.opacity, 0];
  else viewer.opacity = viewer.before;
  setOpacity(viewer.opacity);
}

function openViewer(at) {
  showImage(at);
  find("viewer").showModal();
}

function showImage(at) {
  if (at < 0 || at >= gallery.shown.length) return;
  viewer.at = at;
  const image = gallery.shown[at];
  find("viewer-name").textContent = image.name;
  find("viewer-position").textContent = `${count(at + 1)} of ${count(gallery.shown.length)}`;
  find("viewer-previous").disabled = at === 0;
  find("viewer-next").disabled = at + 1 === gallery.shown.length;
  find("stage").style.setProperty("--ratio", image.width / image.height);
  showPicture(find("viewer-photo"), image, image.photo, report.photographs, image.name);
  showPicture(find("viewer-label"), image, image.picture, report.labels, image.label);
  showFacts(image);
  showButtons(image);
  drawBoxes();
  for (const next of [at - 1, at + 1]) {
    const near = gallery.shown[next];
    if (near?.photo) new Image().src = report.files + near.photo;
  }
}

const address = (folder, name) => folder + name.split("/").map(encodeURIComponent).join("/");

// Show the thumbnail, then the original once it has loaded, if it still has the labeled image's size.
function showPicture(node, image, thumbnail, folder, name) {
  node.hidden = !thumbnail;
  node.classList.remove("original");
  node.removeAttribute("src");
  if (!thumbnail) return;
  node.src = report.files + thumbnail;
  if (!folder || image.width * image.height > MAX_PIXELS) return;
  const original = new Image();
  original.addEventListener("load", () => {
    if (gallery.shown[viewer.at] !== image || original.naturalWidth !== image.width || original.naturalHeight !== image.height) return;
    node.src = original.src;
    node.classList.add("original");
  });
  original.src = address(folder, name);
}

function drawBoxes() {
  const image = gallery.shown[viewer.at];
  const boxes = find("show-boxes").checked ? image.boxes : [];
  find("viewer-boxes").replaceChildren(...boxes.map(([row, score, , x0, y0, x1, y1]) =>
    element("div", {
      className: "box",
      "--color": report.classes[row].color,
      "--left": x0 / 1000, "--top": y0 / 1000, "--width": (x1 - x0) / 1000, "--height": (y1 - y0) / 1000,
    }, element("span", {}, swatch(row), `${report.classes[row].name} ${(score / 1000).toFixed(2)}`))));
}

function showFacts(image) {
  const boxed = new Set(image.boxes.map(([row]) => row));
  const share = (value) => (value / 1000).toFixed(2);
  const line = (row, ...cells) => element("tr", {}, element("th", { scope: "row" }, swatch(row), report.classes[row].name),
    ...cells.map((cell) => element("td", { textContent: cell })));
  const table = (title, heads, rows) => rows.length
    ? [element("table", {}, element("caption", { textContent: title }),
      element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col", textContent: head })))),
      element("tbody", {}, ...rows))]
    : [];
  find("viewer-facts").replaceChildren(
    ...(image.note ? [element("p", { className: "problem", textContent: image.note })] : []),
    element("p", { className: "line" }, element("b", { textContent: "Doubt" }), doubtBadge(image.doubt)),
    ...(image.reason ? [element("p", { className: "reason", textContent: image.reason })] : []),
    element("dl", { className: "parts" }, ...PARTS.map(([, title], row) => element("div", {},
      element("dt", { textContent: title }),
      element("dd", {}, element("span", { className: "track" }, element("i", { "--share": image.parts[row] / 1000 })), share(image.parts[row]))))),
    ...table("Boxes", ["Class", "Score", "Mask"], image.boxes.map(([row, score, quality]) => line(row, share(score), share(quality)))),
    ...table(report.boxed ? "Tags" : "Classes", ["Class", "Score", ""], image.tags.map(([row, score]) => line(row, share(score), boxed.has(row) || !report.boxed ? "" : "no box"))),
    element("p", { className: "muted" }, `${count(image.width)} × ${count(image.height)} pixels`,
      ...(report.photographs && image.photo
        ? [" · ", element("a", { href: address(report.photographs, image.name), target: "_blank", rel: "noopener", textContent: "open the photograph" })]
        : [])),
  );
  find("viewer-facts").scrollTop = 0;
}

// Handle a key in the large view; true if it was one of its keys.
function viewerKey(key) {
  if (key === "ArrowLeft") showImage(viewer.at - 1);
  else if (key === "ArrowRight") showImage(viewer.at + 1);
  else if (key === "b") find("show-boxes").click();
  else if (key in DECISION_KEYS) decide(gallery.shown[viewer.at], DECISION_KEYS[key]);
  else return false;
  return true;
}
