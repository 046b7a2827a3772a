"use strict";
// The page reads in full without this script; it adds sorting, the method filter, the seed switch, and opens what a link or a printer asks for.

const each = (root, selector, act) => root.querySelectorAll(selector).forEach(act);

// A link to a task opens it; paper has everything.
const unfold = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const details = target && target.closest("details");
  if (details) { details.open = true; target.scrollIntoView(); }
};
window.addEventListener("hashchange", unfold);
window.addEventListener("beforeprint", () => each(document, "details", (details) => { details.open = true; }));
unfold();

// What stands in a cell before its small print.
const shown = (cell) => [...cell.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.data).join("").trim();

// Sorting: by data-value, or the text where there is none; an empty value always last; the first click on a number column puts its best (or largest) on top.
each(document, "table.sortable", (table) => {
  each(table, "thead th", (head) => {
    const column = head.cellIndex;
    const numeric = head.classList.contains("num");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.setAttribute("aria-label", "sort by " + head.textContent.trim().replace(/\s+/g, " "));
    head.append(button);
    head.dataset.sortable = "";
    head.addEventListener("click", (event) => {
      if (event.target.closest("a")) return;
      const first = head.dataset.best || (numeric ? "descending" : "ascending");
      const other = first === "descending" ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      each(table, "thead th", (sibling) => sibling.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value ?? shown(row.cells[column]);
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [left, right] = [value(a), value(b)];
        if (left === "" || right === "") return (left === "") - (right === "");
        if (!numeric) return sign * left.localeCompare(right, undefined, { numeric: true });
        return sign * (Number(left) - Number(right) || 0);
      });
      table.tBodies[0].append(...rows);
    });
  });
});

// The filter hides a method in tables (rows and columns), figures, pictures and texts alike; a row of two methods needs both.
const boxes = [...document.querySelectorAll("[data-toggle-method]")];
const apply = () => {
  const off = new Set(boxes.filter((box) => !box.checked).map((box) => box.dataset.toggleMethod));
  each(document, "[data-method]", (element) => {
    element.style.display = element.dataset.method.split(" ").some((method) => off.has(method)) ? "none" : "";
  });
  each(document, "[data-hidden-count]", (place) => { place.textContent = off.size ? `${off.size} hidden` : ""; });
};
boxes.forEach((box) => box.addEventListener("change", apply));
apply(); // a browser may restore unchecked boxes on reload
for (const [selector, checked] of [["[data-all]", true], ["[data-none]", false]]) {
  each(document, selector, (button) => {
    button.hidden = boxes.length < 3;
    button.addEventListener("click", () => { boxes.forEach((box) => { box.checked = checked; }); apply(); });
  });
}

// One seed at a time: the first is shown in the markup already, so the page reads the same without the script.
each(document, "[data-samples]", (samples) => {
  each(samples, ".seeds-switch", (choice) => { choice.hidden = false; });
  each(samples, "[data-show-seed]", (button) => button.addEventListener("click", () => {
    each(samples, "[data-show-seed]", (other) => other.setAttribute("aria-pressed", String(other === button)));
    each(samples, "[data-seed]", (shot) => { shot.hidden = shot.dataset.seed !== button.dataset.showSeed; });
  }));
  each(samples, "[data-search]", (box) => {
    box.hidden = false;
    box.addEventListener("input", () => {
      const wanted = box.value.toLowerCase();
      each(samples, ".card li", (text) => { text.hidden = !text.textContent.toLowerCase().includes(wanted); });
    });
  });
});
