"use strict";
// Tables are whole without this script; it adds sorting, filtering and the choice of a theme.

const read = (cell) => {
  const text = cell.dataset.v;
  if (text === undefined || text === "") return null;
  const number = text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number(text);
  return Number.isNaN(number) ? text : number;
};

const compare = (a, b) =>
  typeof a === "number" && typeof b === "number"
    ? a - b || 0
    : String(a).localeCompare(String(b), "en", { numeric: true });

const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    head.ariaSort = "none";
    button.addEventListener("click", () => {
      const order = NEXT[head.ariaSort];
      for (const other of heads) other.ariaSort = "none";
      head.ariaSort = order;
      const sign = order === "descending" ? -1 : 1;
      const rows = original.map((row) => [read(row.cells[column]), row]);
      if (order !== "none")
        rows.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : sign * compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// The second column stays in sight beside the first.
for (const table of document.querySelectorAll("table.two"))
  table.style.setProperty("--first", `${table.tHead.rows[0].cells[0].offsetWidth}px`);

for (const filter of document.querySelectorAll(".filter")) {
  const input = filter.querySelector("input");
  const count = filter.querySelector("output");
  const rows = [...document.getElementById(input.getAttribute("aria-controls")).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, index) => {
      row.hidden = !words.every((word) => texts[index].includes(word));
      shown += !row.hidden;
    });
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  };
  input.addEventListener("input", apply);
  filter.hidden = false;
}

const theme = document.querySelector(".theme");
theme.hidden = false;
theme.querySelector("select").addEventListener("change", (event) => {
  document.documentElement.style.colorScheme = event.target.value;
});

// A link to a machine opens what is folded.
const open = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
  else if (target?.matches("tr")) target.focus();
};
addEventListener("hashchange", open);
open();
