"use strict";
// The list of clips: filter by text, sort by a column. Only rows near the top are made until the list is scrolled.
vaflow.ClipList = class {
  constructor(root, clips, onChoose) {
    Object.assign(this, { clips, onChoose, order: clips, column: null, descending: false, limit: 200 });
    this.body = root.querySelector("tbody");
    this.filter = root.querySelector("input");
    this.count = root.querySelector("[data-count]");
    this.heads = [...root.querySelectorAll("th[data-key]")];
    this.filter.addEventListener("input", () => this.update());
    this.heads.forEach((head) => head.querySelector("button").addEventListener("click", () => this.sort(head.dataset.key)));
    root.querySelector(".scroll").addEventListener("scroll", (event) => {
      const box = event.target;
      if (box.scrollTop + box.clientHeight > box.scrollHeight - 200 && this.limit < this.order.length) {
        this.limit += 200;
        this.fill();
      }
    });
    this.update();
  }

  static key(name) {
    return {
      id: (clip) => clip.id,
      seconds: (clip) => clip.seconds,
      ccc: (clip) => clip.ccc.mean ?? null,
      rmse: (clip) => clip.rmse.mean ?? null,
      face: (clip) => clip.missing_face,
    }[name];
  }

  sort(name) {
    this.descending = this.column === name ? !this.descending : name !== "id" && name !== "ccc";
    this.column = name;
    this.heads.forEach((head) => {
      if (head.dataset.key === name) head.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    this.update();
  }

  update() {
    const text = this.filter.value.trim().toLowerCase();
    const kept = this.clips.filter((clip) => `${clip.id} ${clip.split}`.toLowerCase().includes(text));
    this.order = this.column ? vaflow.sorted(kept, vaflow.ClipList.key(this.column), this.descending) : kept;
    this.count.textContent = `${kept.length} of ${this.clips.length} clips`;
    this.fill();
  }

  fill() {
    const { element, number } = vaflow;
    const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);
    this.body.replaceChildren(
      ...this.order.slice(0, this.limit).map((clip) =>
        element(
          "tr",
          { class: clip === this.shown ? "shown" : null, "data-clip": clip.id },
          element("td", { class: "name" }, element("button", { type: "button", "aria-current": clip === this.shown ? "true" : null, onclick: () => this.onChoose(clip) }, clip.id)),
          element("td", {}, vaflow.seconds(clip.seconds).replace(/\.\d+$/, "")),
          element("td", {}, number(clip.ccc.mean)),
          element("td", {}, number(clip.rmse.mean)),
          element("td", {}, percent(clip.missing_face)),
        ),
      ),
    );
  }

  select(clip) {
    this.shown = clip;
    this.fill();
  }

  // The clip `step` places further in the order that is shown.
  next(step) {
    const at = this.order.indexOf(this.shown);
    return this.order[vaflow.clamp(at + step, 0, this.order.length - 1)];
  }
};
