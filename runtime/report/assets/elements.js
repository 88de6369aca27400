"use strict";
// Names come from files and class lists. They are set as text and properties only, never as markup.

const report = { images: [], classes: [] }; // filled by showReport() in start.js

const find = (id) => document.getElementById(id);
const format = new Intl.NumberFormat("en");
const count = (number) => format.format(number);
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;
const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

// Create an element with properties or attributes, custom style properties (--name) and children.
function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const swatch = (row) => element("i", { className: "swatch", "--color": report.classes[row].color });

// A short text for a duration in seconds.
function duration(seconds) {
  if (seconds >= 10) return `${seconds.toFixed(0)} s`;
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  return `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
}
