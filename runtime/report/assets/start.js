// Starts the page: showReport(), which the data file calls, and the keys.

// Unpack one row of the data, which _row() in runtime/report/page.py packs. Scores, shares and edges of boxes are thousandths.
function unpack([name, label, photo, picture, note, width, height, doubt, parts, cause, reason, tags, boxes, version]) {
  const classes = new Set([...boxes.map(([row]) => row), ...tags.map(([row]) => row)]);
  return {
    name, label, photo, picture, note, width, height, parts, cause, reason, tags, boxes, classes, version,
    doubt: doubt / 1000, search: name.toLowerCase(), empty: !(report.boxed ? boxes : tags).length,
  };
}

function showReport(data) {
  report.boxed = data.boxed;
  Object.assign(report, data, { images: data.images.map(unpack) });
  document.querySelector("main").hidden = false;
  showSummary(data.totals, data.failures, data.settings);
  startDecisions();
  startGallery();
  startViewer();
}

const toggleKeys = () => (find("keys").open ? find("keys").close() : find("keys").showModal());
find("show-keys").addEventListener("click", toggleKeys);
find("keys-close").addEventListener("click", toggleKeys);
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // its backdrop
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !report.images.length) return;
  const { target } = event;
  const typing = target.matches("select, input:not([type=range], [type=checkbox], [type=radio])");
  const sliding = target.matches("input") && event.key.startsWith("Arrow"); // the arrow keys move the slider
  if (typing || sliding) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const known = { "[": () => setOpacity(viewer.opacity - 10), "]": () => setOpacity(viewer.opacity + 10), l: toggleLabel, "?": toggleKeys };
  const inKeys = find("keys").open && key !== "?";
  if (inKeys) return;
  if (key in known) known[key]();
  else if (!(find("viewer").open ? viewerKey(key) : galleryKey(key))) return;
  event.preventDefault();
});

document.addEventListener("DOMContentLoaded", () => {
  if (!document.querySelector("main").hidden) return;
  find("problem").textContent = "The folder with this page's data is missing: keep the page and its folder .files together.";
  find("problem").hidden = false;
});
