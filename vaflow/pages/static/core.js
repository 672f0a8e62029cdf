"use strict";
// One namespace for the page's scripts, which run in order. Text from data sets goes through textContent only.
const vaflow = {
  data: JSON.parse(document.getElementById("data").textContent),
  DIMENSIONS: ["valence", "arousal"],

  // Return an element with attributes and children; strings become text nodes.
  element(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  },

  number(value, places = 2) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    return value.toFixed(places).replace("-", "\u2212");
  },

  signed(value, places = 2) {
    return (value >= 0 ? "+" : "") + vaflow.number(value, places);
  },

  seconds(value) {
    const hundredths = Math.round(100 * value); // rounded first: 59.999 is 1:00.00
    const minutes = Math.floor(hundredths / 6000);
    return `${minutes}:${(hundredths / 100 - 60 * minutes).toFixed(2).padStart(5, "0")}`;
  },

  color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  },

  // Call `draw` when light and dark switch.
  onTheme(draw) {
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  },

  // Scale a canvas to its size on the screen; return a context in CSS pixels.
  fit(canvas, height) {
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    if (height) canvas.style.height = `${height}px`;
    const tall = height || canvas.clientHeight;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(tall * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, tall);
    return { context, width, height: tall };
  },

  clamp(value, low, high) {
    return Math.min(high, Math.max(low, value));
  },

  // Sort rows by a column of numbers or text; missing values come last in both directions.
  sorted(rows, key, descending) {
    return rows.slice().sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || x === undefined) return y === null || y === undefined ? 0 : 1;
      if (y === null || y === undefined) return -1;
      const order = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return descending ? -order : order;
    });
  },
};
