"use strict";
// The valence-arousal plane: the predicted point with a fading tail, the label, and a rating in progress.
vaflow.Plane = class {
  constructor(canvas) {
    this.canvas = canvas;
    this.clip = null;
    this.rating = null; // [valence, arousal] while a person rates
    new ResizeObserver(() => this.draw(this.row || 0)).observe(canvas);
    vaflow.onTheme(() => this.draw(this.row || 0));
  }

  // Pixel <-> value, with a margin for the names of the axes.
  get frame() {
    return { margin: 22, size: Math.max(20, this.canvas.clientWidth - 44) };
  }

  point(v, a) {
    const { margin, size } = this.frame;
    return [margin + ((v + 1) / 2) * size, margin + ((1 - a) / 2) * size];
  }

  valueAt(event) {
    const box = this.canvas.getBoundingClientRect(), { margin, size } = this.frame;
    const share = (pixel, edge) => vaflow.clamp((pixel - edge - margin) / size, 0, 1) * 2 - 1;
    return [share(event.clientX, box.left + 1), -share(event.clientY, box.top + 1)];
  }

  draw(row) {
    this.row = row;
    const { context, width, height } = vaflow.fit(this.canvas);
    const { margin, size } = this.frame, half = vaflow.data.centers / 2;
    context.lineWidth = 1;
    for (const [v, name] of [[-half, "grid"], [half, "grid"], [0, "line"]]) {
      context.strokeStyle = vaflow.color(name);
      context.beginPath();
      context.moveTo(...this.point(v, -1));
      context.lineTo(...this.point(v, 1));
      context.moveTo(...this.point(-1, v));
      context.lineTo(...this.point(1, v));
      context.stroke();
    }
    context.strokeStyle = vaflow.color("line");
    context.strokeRect(margin, margin, size, size);
    context.fillStyle = vaflow.color("soft");
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    context.fillText("valence →", width / 2, height - 6);
    context.save();
    context.translate(14, height / 2);
    context.rotate(-Math.PI / 2);
    context.fillText("arousal →", 0, 0);
    context.restore();
    if (this.clip) this.drawPoints(context, row);
    if (this.rating) this.mark(context, this.point(...this.rating), vaflow.color("text"), "cross");
  }

  drawPoints(context, row) {
    const { time, value, label, std } = this.clip;
    const first = vaflow.after(time, time[row] - 3);
    const jump = Math.max(1, Math.ceil((row - first) / 60));
    context.strokeStyle = vaflow.color("prediction");
    context.lineWidth = 3;
    for (let i = first; i + jump <= row; i += jump) {
      context.globalAlpha = 0.1 + 0.7 * ((i - first) / Math.max(1, row - first));
      context.beginPath();
      context.moveTo(...this.point(value[0][i], value[1][i]));
      context.lineTo(...this.point(value[0][i + jump], value[1][i + jump]));
      context.stroke();
    }
    context.globalAlpha = 1;
    const [x, y] = this.point(value[0][row], value[1][row]);
    if (std) {
      context.fillStyle = vaflow.color("band");
      context.beginPath();
      context.ellipse(x, y, std[0][row] * this.frame.size, std[1][row] * this.frame.size, 0, 0, 7); // 2 std, at size / 2 per unit
      context.fill();
    }
    if (label && !Number.isNaN(label[0][row]) && !Number.isNaN(label[1][row])) {
      this.mark(context, this.point(label[0][row], label[1][row]), vaflow.color("label"), "ring");
    }
    this.mark(context, [x, y], vaflow.color("prediction"), "dot");
  }

  // Shapes differ as well as colours: a dot is predicted, a ring is the label, a cross is the rating.
  mark(context, [x, y], color, shape) {
    context.lineWidth = 2.5;
    context.strokeStyle = context.fillStyle = color;
    context.beginPath();
    if (shape === "cross") {
      context.moveTo(x - 8, y);
      context.lineTo(x + 8, y);
      context.moveTo(x, y - 8);
      context.lineTo(x, y + 8);
    } else context.arc(x, y, shape === "dot" ? 6 : 8, 0, 7);
    if (shape === "dot") context.fill();
    else context.stroke();
  }
};
