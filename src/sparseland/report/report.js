// Tooltips for the marks of the plots: nearest mark to the pointer, a tap, or the arrow keys.
// Without this script the marks keep their <title>, which browsers show on hover.
(() => {
  const REACH = 26; // pixels around a mark that count as on it

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true"); // the mark's own label says the same
  document.body.append(tip);
  let lit = null;

  const centre = (point) => {
    const box = (point.querySelector("use") ?? point).getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };

  function show(point, text) {
    if (lit === point) return;
    hide();
    lit = point;
    point.classList.add("lit");
    tip.replaceChildren(...text.split("\n").map((line) => {
      const row = document.createElement("div");
      row.textContent = line;
      return row;
    }));
    tip.hidden = false;
    const [x, y] = centre(point);
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${window.scrollX + Math.max(8, Math.min(x + 14, room))}px`;
    const above = y - tip.offsetHeight - 14;
    tip.style.top = `${window.scrollY + (above > 8 ? above : y + 14)}px`;
  }

  function hide() {
    lit?.classList.remove("lit");
    lit = null;
    tip.hidden = true;
  }

  for (const plot of document.querySelectorAll(".plot > svg")) {
    const points = [...plot.querySelectorAll(".point")];
    const texts = new Map(points.map((point) => {
      const title = point.querySelector("title");
      title.remove(); // or the browser would show a second tooltip
      return [point, title.textContent];
    }));
    points.sort((a, b) => centre(a)[0] - centre(b)[0]);

    const nearest = (event) => {
      let best = null;
      let least = REACH;
      for (const point of points) {
        const [x, y] = centre(point);
        const far = Math.hypot(x - event.clientX, y - event.clientY);
        if (far < least) [best, least] = [point, far];
      }
      return best;
    };
    const focused = () => points.find((point) => point === document.activeElement);
    const follow = (event) => {
      const point = nearest(event) ?? focused();
      if (point) show(point, texts.get(point));
      else hide();
    };

    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && !focused()) hide();
    });
    plot.addEventListener("focusin", () => {
      const point = focused();
      if (point) show(point, texts.get(point));
    });
    plot.addEventListener("focusout", hide);
    plot.addEventListener("keydown", (event) => {
      const at = points.indexOf(focused());
      const to = {
        ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: points.length - 1,
      }[event.key];
      if (event.key === "Escape") hide();
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      const next = points[Math.max(0, Math.min(to, points.length - 1))];
      points[at].tabIndex = -1; // one tab stop a plot, wherever the reader is in it
      next.tabIndex = 0;
      next.focus({ preventScroll: true });
    });
  }

  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".plot > svg")) hide();
  });
})();
