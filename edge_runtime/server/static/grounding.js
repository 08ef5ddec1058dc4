// Places that an answer names, read and drawn: `<ref>label</ref><box>x1 y1 x2 y2</box>`, also `<quad>` and `<point>`.
//
// Numbers are thousandths of the picture's width and height; the same rules as edge_runtime/generation/grounding.py.

import { element, svg } from "./dom.js";
import { t } from "./language.js";

const SCALE = 1000;
const N_NUMBERS = { box: 4, quad: 8, point: 2 };
const N_COLOURS = 6; // --place-0 … in style.css

/** A closing tag may be missing or lack its slash, as in the authors' own examples. */
export const TAGS = /<ref>(?<label>[\s\S]*?)<\/ref>|<(?<kind>box|quad|point)>(?<numbers>[^<]*)(?:<\/?\k<kind>>)?/g;

/** Corners in 0..1000, or null where the count of numbers is wrong. */
export function pointsOf(kind, numbers) {
  const found = (numbers.match(/[-+]?\d+(?:\.\d+)?/g) ?? []).map((n) => Math.min(Math.max(Number(n), 0), SCALE));
  if (found.length !== N_NUMBERS[kind]) return null;
  const points = [];
  for (let i = 0; i < found.length; i += 2) points.push([found[i], found[i + 1]]);
  return points;
}

/** Places in order: `{kind, label, points}`; the label is the text of the nearest `<ref>` before it. */
export function findPlaces(text) {
  const places = [];
  let label = null;
  for (const { groups } of text.matchAll(TAGS)) {
    if (!groups.kind) {
      label = groups.label.trim() || null;
      continue;
    }
    const points = pointsOf(groups.kind, groups.numbers);
    if (points) places.push({ kind: groups.kind, label, points });
  }
  return places;
}

export const colourOf = (number) => `var(--place-${number % N_COLOURS})`;

/** A picture with places drawn on it. Lines keep their width at every size, and have a light edge for dark pictures. */
export function drawPlaces(address, places) {
  const overlay = svg("svg", { viewBox: `0 0 ${SCALE} ${SCALE}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const labels = places.map((place, number) => {
    const group = svg("g", { class: "place", "data-place": number });
    group.style.setProperty("--place", colourOf(number));
    for (const name of ["edge", "line"]) group.append(outline(place, name));
    overlay.append(group);
    return labelOf(place, number);
  });
  const names = places.map(({ label }, number) => label ?? t("place {0}", number + 1)).join(", ");
  return element(
    "figure",
    { class: "places" },
    element("div", { class: "canvas" }, element("img", { src: address, alt: t("The picture, with marks: {0}", names) }), overlay, ...labels),
  );
}

function outline({ kind, points }, name) {
  const common = { class: name, "vector-effect": "non-scaling-stroke" };
  // A zero-length line with round ends is a dot that keeps its shape when the picture is stretched.
  if (kind === "point") return svg("path", { ...common, class: `${name} dot`, d: `M${points[0]}h0.01` });
  const [[x1, y1], [x2, y2]] = points;
  const corners = kind === "box" ? [[x1, y1], [x2, y1], [x2, y2], [x1, y2]] : points;
  return svg("polygon", { ...common, points: corners.join(" ") });
}

function labelOf({ label, points }, number) {
  const left = Math.min(...points.map(([x]) => x)) / 10;
  const top = Math.min(...points.map(([, y]) => y)) / 10;
  const node = element("span", { class: "tag", "data-place": number, "aria-hidden": "true" }, label ? `${number + 1} ${label}` : `${number + 1}`);
  node.style.setProperty("--place", colourOf(number));
  node.style.left = `${Math.min(left, 88)}%`;
  node.style.top = `${top}%`;
  node.classList.toggle("inside", top < 9); // no room above
  return node;
}
