// Decisions about images: accepted, rejected, unsure. They stay in this browser until they are saved as a file, which
// wsss train, convert and label take with --exclude.

const DECISIONS = { accept: "Accepted", reject: "Rejected", unsure: "Unsure" };
const DECISION_KEYS = { a: "accept", r: "reject", u: "unsure" };
const decisions = { of: new Map(), others: {}, place: "", kept: true }; // others: about images that this page does not show

// Read what an earlier visit decided, except about labels that have changed since.
function startDecisions() {
  decisions.place = `wsss decisions ${location.pathname}`;
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(decisions.place) ?? "{}");
  } catch {
    decisions.kept = false; // storage is blocked
  }
  decisions.others = { ...stored };
  for (const image of report.images) {
    const found = stored[image.name];
    delete decisions.others[image.name];
    if (found && found.label === image.version && found.decision in DECISIONS) decisions.of.set(image.name, found.decision);
  }
  find("save-decisions").addEventListener("click", saveDecisions);
  find("viewer-decide").addEventListener("click", (event) => {
    const decision = event.target.closest("button")?.value;
    if (decision) decide(gallery.shown[viewer.at], decision);
  });
  countDecisions();
}

const decisionOf = (image) => decisions.of.get(image.name) ?? "";

// Decide about an image; the same decision again takes it back.
function decide(image, decision) {
  if (decisionOf(image) === decision) decisions.of.delete(image.name);
  else decisions.of.set(image.name, decision);
  try {
    localStorage.setItem(decisions.place, JSON.stringify(decidedImages()));
  } catch {
    decisions.kept = false;
  }
  countDecisions();
  showDecision(image);
}

function decidedImages() {
  const versions = new Map(report.images.map((image) => [image.name, image.version]));
  const shown = Object.fromEntries([...decisions.of].map(([name, decision]) => [name, { decision, label: versions.get(name) }]));
  return { ...decisions.others, ...shown };
}

function countDecisions() {
  const counts = Object.entries(DECISIONS).map(([decision, title]) =>
    [[...decisions.of.values()].filter((each) => each === decision).length, title.toLowerCase()]).filter(([number]) => number);
  const lost = decisions.kept ? "" : " This browser does not keep them: save them before you leave.";
  find("decisions").hidden = !counts.length;
  find("decisions").querySelector("span").textContent = counts.map(([number, title]) => `${count(number)} ${title}`).join(", ") + (counts.length ? "." : "") + lost;
}

// Show a changed decision on the image's card and in the large view, without moving cards.
function showDecision(image) {
  const card = cardAt(gallery.shown.indexOf(image));
  card?.replaceWith(cardButton(image, Number(card.dataset.at), card.tabIndex));
  if (find("viewer").open && gallery.shown[viewer.at] === image) showButtons(image);
  else cardAt(gallery.at)?.focus();
}

function showButtons(image) {
  for (const button of find("viewer-decide").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.value === decisionOf(image)));
  }
}

function saveDecisions() {
  const text = JSON.stringify({ store: report.title, decisions: decidedImages() }, null, 1) + "\n";
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "decisions.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
