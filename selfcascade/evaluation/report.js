"use strict";
// The page says everything without this file. It adds two things: tables are sorted by a click on a heading, and a click on a picture shows its row large.

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const [fixed, rows] = [[], []];
  for (const row of body.rows) (row.classList.contains("reference") ? fixed : rows).push(row);
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      // Best first, worst first, as it was.
      const best = heading.dataset.better === "higher" ? "descending" : "ascending";
      const worst = best === "ascending" ? "descending" : "ascending";
      const next = { [best]: worst, [worst]: null }[heading.ariaSort];
      const order = next === undefined ? best : next;
      for (const other of headings) other.ariaSort = null;
      heading.ariaSort = order;
      body.append(...(order ? sorted(rows, column, order === "ascending" ? 1 : -1) : rows), ...fixed);
    });
  });
}

function sorted(rows, column, sign) {
  const key = (row) => row.cells[column].dataset.value ?? (column ? null : row.cells[column].textContent);
  return [...rows].sort((one, other) => {
    const [left, right] = [key(one), key(other)];
    if (left === null || right === null) return (left === null) - (right === null); // blanks last, either way
    return sign * (column ? left - right : left.localeCompare(right));
  });
}

const dialog = document.querySelector("dialog");
if (dialog) {
  const rows = [...document.querySelectorAll(".sheet tbody tr")];
  const panes = dialog.querySelector(".panes");
  let [place, scale, near] = [0, 3, false];

  const show = (wanted) => {
    place = (wanted + rows.length) % rows.length;
    dialog.querySelector("h3").textContent = rows[place].cells[0].textContent;
    panes.replaceChildren(...[...rows[place].querySelectorAll("img")].map((picture) => {
      const figure = document.createElement("figure");
      const pane = document.createElement("div");
      const caption = document.createElement("figcaption");
      const copy = new Image(picture.naturalWidth, picture.naturalHeight);
      copy.src = picture.src;
      copy.alt = picture.alt;
      caption.textContent = picture.dataset.caption;
      pane.append(copy);
      figure.append(pane, caption);
      return figure;
    }));
    magnify(1);
  };
  const magnify = (factor) => {
    scale = Math.min(16, Math.max(1, scale * factor));
    for (const picture of panes.querySelectorAll("img")) picture.style.transform = near ? `scale(${scale})` : "";
  };
  const point = (at) => {
    near = at;
    magnify(1);
  };
  const open = (picture) => {
    show(rows.indexOf(picture.closest("tr")));
    dialog.showModal();
  };

  for (const picture of document.querySelectorAll(".sheet img")) {
    picture.tabIndex = 0;
    picture.role = "button";
    picture.addEventListener("click", () => open(picture));
    picture.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        open(picture);
      }
    });
  }
  // The same place of every method's picture is in view: what differs is seen where it differs.
  panes.addEventListener("pointermove", (event) => {
    const pane = event.target.closest(".panes figure > div");
    if (!pane) return;
    if (!near) point(true);
    const box = pane.getBoundingClientRect();
    const origin = `${(100 * (event.clientX - box.left)) / box.width}% ${(100 * (event.clientY - box.top)) / box.height}%`;
    for (const picture of panes.querySelectorAll("img")) picture.style.transformOrigin = origin;
  });
  panes.addEventListener("pointerleave", () => point(false));
  panes.addEventListener("wheel", (event) => {
    event.preventDefault();
    magnify(event.deltaY < 0 ? 1.25 : 0.8);
  }, { passive: false });
  dialog.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: () => show(place - 1), ArrowRight: () => show(place + 1), "+": () => magnify(1.25), "-": () => magnify(0.8) }[event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  dialog.querySelector("[name=before]").addEventListener("click", () => show(place - 1));
  dialog.querySelector("[name=after]").addEventListener("click", () => show(place + 1));
  dialog.querySelector("[name=closer]").addEventListener("click", () => magnify(1.25));
  dialog.querySelector("[name=farther]").addEventListener("click", () => magnify(0.8));
}
