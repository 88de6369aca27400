// The top of the page: numbers of the run, classes, failures, settings.

const FEW_CLASSES = 8;
const FAILURES_AT_ONCE = 100;
const histogram = { measure: "images", all: false };

function showSummary(totals, failures, settings) {
  const shown = report.images.length;
  find("subtitle").textContent =
    shown < totals.images
      ? `The ${count(shown)} most doubtful of ${plural(totals.images, "labeled image")}`
      : `${plural(shown, "labeled image")}, most doubtful first`;
  const missing = report.images.filter((image) => image.note).length;
  const tile = (name, value, about = "", alarm = false) =>
    element("div", { className: alarm ? "tile alarm" : "tile" },
      element("dt", { textContent: name }), element("dd", {}, value, element("small", { textContent: about })));
  find("tiles").append(
    tile("Images", count(totals.images), totals.empty ? `${count(totals.empty)} empty` : ""),
    ...(report.boxed
      ? [tile("Boxes", count(totals.boxes), totals.images ? `${(totals.boxes / totals.images).toFixed(1)} an image` : "")]
      : []),
    tile("Classes", count(report.classes.filter((each) => each.images).length), `of ${count(report.classes.length)} found`),
    tile("Void", percent(totals.void), "of all pixels"),
    tile("Failed", count(totals.failed), totals.failed ? "listed below" : "", totals.failed > 0),
    ...(missing ? [tile("Pictures missing", count(missing), "missing or changed", true)] : []),
    ...(totals.seconds ? [tile("Time", duration(totals.seconds), "an image")] : []),
  );
  if (totals.seconds) showStages(Object.entries(totals.stages));
  showFailures(totals.failed, failures);
  find("settings").querySelector("pre").textContent = JSON.stringify(settings, null, 1);
  for (const choice of document.getElementsByName("measure")) {
    choice.parentElement.hidden = choice.value !== "images" && !report.classes.some((each) => each[choice.value]);
  }
  find("classes").open = matchMedia("(min-width: 700px)").matches; // on a phone, the gallery matters more
  find("measure").addEventListener("change", (event) => {
    histogram.measure = event.target.value;
    showHistogram();
  });
  find("all-classes").addEventListener("click", () => {
    histogram.all = !histogram.all;
    showHistogram();
  });
  showHistogram();
}

function showStages(stages) {
  const total = stages.reduce((sum, [, seconds]) => sum + seconds, 0);
  find("stages").append(
    element("div", { className: "stack", "aria-hidden": "true" },
      ...stages.map(([, seconds], row) => element("i", { className: `stage-${row % 6}`, "--share": seconds / total }))),
    element("ul", { "aria-label": "Seconds an image, by stage" },
      ...stages.map(([name, seconds], row) => element("li", {},
        element("i", { className: `key stage-${row % 6}` }), `${name} `, element("b", { textContent: duration(seconds) })))),
  );
}

function showHistogram() {
  const rows = report.classes.map((_, row) => row);
  const value = (row) => report.classes[row][histogram.measure];
  rows.sort((a, b) => value(b) - value(a));
  const most = Math.max(value(rows[0]), 1);
  const sum = rows.reduce((all, row) => all + value(row), 0);
  const shown = histogram.all ? rows : rows.slice(0, FEW_CLASSES);
  find("histogram").replaceChildren(...shown.map((row) => element("li", {},
    element("button", {
      type: "button",
      className: "class",
      "aria-pressed": String(gallery.row === row),
      onclick: () => chooseClass(gallery.row === row ? null : row),
    },
      swatch(row),
      element("span", { className: "name", textContent: report.classes[row].name, title: report.classes[row].name }),
      element("span", { className: "number", textContent:
        histogram.measure === "pixels" ? percent(sum ? value(row) / sum : 0) : count(value(row)) }),
      element("span", { className: "track" }, element("i", { "--share": value(row) / most }))))));
  const more = find("all-classes");
  more.hidden = rows.length <= FEW_CLASSES;
  more.textContent = histogram.all ? "Show fewer" : `Show all ${count(rows.length)} classes`;
}

function showFailures(total, failures) {
  const panel = find("failures");
  const [list, more] = [panel.querySelector("ul"), panel.querySelector("button")];
  panel.hidden = !total;
  panel.querySelector("h2").textContent = plural(total, "image") + " failed";
  const add = () => {
    const from = list.children.length;
    list.append(...failures.slice(from, from + FAILURES_AT_ONCE).map(([name, reason]) => element("li", {},
      element("b", { textContent: name }), " ",
      element("span", { textContent: reason.startsWith(`${name}: `) ? reason.slice(name.length + 2) : reason }))));
    more.hidden = list.children.length >= failures.length;
    if (more.hidden && failures.length < total) {
      list.append(element("li", { textContent: `and ${count(total - failures.length)} more, in manifest.jsonl` }));
    }
  };
  more.addEventListener("click", add);
  add();
}
