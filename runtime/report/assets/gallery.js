// The gallery: search, filters, order, pages of cards, and the keys that move between them.

const CARDS = 60; // on a page; fills whole rows of 2 to 6 cards
const CHIPS = 4; // classes named on a card
const TAIL = 12; // letters at the end of a file's name that are always visible
const gallery = { shown: [], page: 0, at: 0, row: null }; // at: the card that Tab reaches; row: the selected class

const ORDERS = {
  doubt: (a, b) => b.doubt - a.doubt,
  sure: (a, b) => a.doubt - b.doubt,
  boxes: (a, b) => b.boxes.length - a.boxes.length,
  name: (a, b) => (a.search < b.search ? -1 : a.search > b.search ? 1 : 0),
};

function startGallery() {
  find("class").append(...report.classes.map((each, row) =>
    element("option", { value: row, textContent: `${each.name} (${count(each.images)})` })));
  find("search").addEventListener("input", filter);
  find("search").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && event.target.value) {
      event.preventDefault();
      event.target.value = "";
      filter();
    } else if (event.key === "Escape" || event.key === "Enter") {
      event.preventDefault();
      focusCard(0);
    }
  });
  find("class").addEventListener("change", (event) => chooseClass(event.target.value === "" ? null : Number(event.target.value)));
  for (const id of ["cause", "decision", "order"]) find(id).addEventListener("change", filter);
  find("previous").addEventListener("click", () => turnPage(-1));
  find("next").addEventListener("click", () => turnPage(1));
  find("reset").addEventListener("click", () => {
    find("search").value = find("cause").value = find("decision").value = "";
    chooseClass(null);
    focusCard(0);
  });
  find("grid").addEventListener("click", (event) => {
    const card = event.target.closest(".card");
    if (card) openViewer(Number(card.dataset.at));
  });
  find("grid").addEventListener("focusin", (event) => {
    const card = event.target.closest(".card");
    if (card) markCard(Number(card.dataset.at));
  });
  filter();
}

function chooseClass(row) {
  gallery.row = row;
  find("class").value = row ?? "";
  showHistogram();
  filter();
}

function filter() {
  const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const cause = find("cause").value;
  const decision = find("decision").value;
  const fits = (image) =>
    words.every((word) => image.search.includes(word)) &&
    (gallery.row === null || image.classes.has(gallery.row)) &&
    (!decision || (decisionOf(image) || "none") === decision) &&
    (!cause || image.cause === cause || (cause === "empty" && image.empty) || (cause === "note" && image.note));
  gallery.shown = report.images.filter(fits).sort(ORDERS[find("order").value]);
  gallery.page = 0;
  gallery.at = 0;
  drawPage();
}

const pages = () => Math.max(1, Math.ceil(gallery.shown.length / CARDS));

function drawPage() {
  const first = gallery.page * CARDS;
  const shown = gallery.shown.slice(first, first + CARDS);
  find("grid").replaceChildren(...shown.map((image, row) => card(image, first + row)));
  find("nothing").hidden = shown.length > 0;
  find("count").textContent = shown.length
    ? `${count(first + 1)}–${count(first + shown.length)} of ${plural(gallery.shown.length, "image")}`
    : "no image";
  find("page").textContent = `${count(gallery.page + 1)} / ${count(pages())}`;
  find("previous").disabled = gallery.page === 0;
  find("next").disabled = gallery.page + 1 >= pages();
  markCard(gallery.at);
}

const card = (image, at) => element("li", {}, cardButton(image, at, -1));

function cardButton(image, at, tabIndex) {
  const picture = (name, kind) => element("img", { className: kind, loading: "lazy", decoding: "async", alt: "", src: report.files + name });
  const named = [...image.classes].slice(0, CHIPS);
  const decision = decisionOf(image);
  return element("button", { type: "button", className: `card ${decision}`, tabIndex, "data-at": at },
    element("span", { className: "picture" },
      ...(image.photo ? [picture(image.photo, "photo")] : []),
      ...(image.picture ? [picture(image.picture, "label")] : []),
      ...(decision ? [element("span", { className: "decision", textContent: DECISIONS[decision] })] : []),
      doubtBadge(image.doubt)),
    fileName(image.name),
    element("span", { className: "chips" },
      ...named.map((row) => element("span", { className: "chip" }, swatch(row), report.classes[row].name)),
      ...(image.classes.size > CHIPS ? [element("span", { className: "chip", textContent: `+${image.classes.size - CHIPS}` })] : []),
      ...(image.classes.size ? [] : [element("span", { className: "none", textContent: "nothing labeled" })])),
    element("span", { className: image.note ? "reason alarm" : "reason", textContent: image.note || image.reason }));
}

// A long name is shortened in its middle, because its end distinguishes files.
function fileName(name) {
  const letters = [...name];
  return element("span", { className: "file", title: name },
    element("span", { className: "name", textContent: letters.slice(0, -TAIL).join("") }),
    element("span", { textContent: letters.slice(-TAIL).join("") }));
}

function doubtBadge(doubt) {
  const level = doubt >= 0.5 ? "high" : doubt >= 0.25 ? "middle" : "low";
  return element("span", { className: `doubt ${level}`, title: "Doubt, 0 to 1" },
    element("span", { className: "unseen", textContent: "doubt " }), doubt.toFixed(2));
}

function turnPage(step) {
  const page = gallery.page + step;
  if (page < 0 || page >= pages()) return;
  gallery.page = page;
  gallery.at = page * CARDS;
  drawPage();
  find("gallery").scrollIntoView({ block: "start" });
}

const cardAt = (at) => find("grid").querySelector(`[data-at="${at}"]`);

// Only one card at a time can be reached with Tab; arrow keys move to the others.
function markCard(at) {
  cardAt(gallery.at)?.setAttribute("tabindex", "-1");
  gallery.at = at;
  cardAt(at)?.setAttribute("tabindex", "0");
}

// Focus a card by its place among the filtered images, on any page.
function focusCard(at) {
  if (!gallery.shown.length) return;
  const to = Math.min(Math.max(at, 0), gallery.shown.length - 1);
  const page = Math.floor(to / CARDS);
  if (page !== gallery.page) {
    gallery.page = page;
    gallery.at = to;
    drawPage();
  }
  markCard(to);
  cardAt(to).focus();
}

function columns() {
  const cards = [...find("grid").children];
  const lower = cards.findIndex((card) => card.offsetTop > cards[0].offsetTop);
  return lower < 0 ? cards.length : lower;
}

// Handle a key while no dialog is open; true if it was one of the page's keys.
function galleryKey(key) {
  const inGrid = find("grid").contains(document.activeElement);
  if (key.startsWith("Arrow")) {
    if (!inGrid && (key === "ArrowUp" || key === "ArrowDown")) return false; // these scroll the page
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    focusCard(inGrid ? gallery.at + steps[key] : gallery.at);
  } else if (inGrid && key === "Home") focusCard(gallery.page * CARDS);
  else if (inGrid && key === "End") focusCard(gallery.page * CARDS + CARDS - 1);
  else if (key === "/") {
    find("search").focus();
    find("search").select();
  } else if (key === "n" || key === "p") {
    turnPage(key === "n" ? 1 : -1);
    if (inGrid) focusCard(gallery.at);
  } else if (inGrid && key in DECISION_KEYS) decide(gallery.shown[gallery.at], DECISION_KEYS[key]);
  else return false;
  return true;
}
