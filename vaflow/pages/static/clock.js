"use strict";
// What plays: a media element, or a silent clock where there is no media file. Times are seconds on the clip clock.
vaflow.Clock = class {
  // onTime(t, shown) is called for each shown frame; `shown` is true where t is the time of the frame on the screen.
  constructor(media, onTime, onState) {
    this.media = media;
    this.onTime = onTime;
    this.onState = onState;
    this.silent = true;
    this.now = 0;
    this.end = 0;
    this.rate = 1;
    this.playing = false;
    this.span = null;
    this.byFrame = "requestVideoFrameCallback" in HTMLVideoElement.prototype;
    for (const name of ["play", "pause", "ended", "seeked", "error", "loadeddata"]) media.addEventListener(name, () => this.changed(name));
    requestAnimationFrame((now) => this.tick(now));
    if (this.byFrame) this.waitForFrame();
  }

  load(source, video, end) {
    this.pause();
    this.end = end;
    this.now = 0;
    this.span = null;
    this.silent = source === null;
    this.video = video;
    if (this.silent) this.media.removeAttribute("src");
    else this.media.src = source;
    this.media.load();
    this.media.playbackRate = this.media.defaultPlaybackRate = this.rate;
    this.onTime(0, false);
    this.onState();
  }

  // Seconds right now: between frames this is later than the time of the shown frame.
  get time() {
    return this.silent ? this.now : this.media.currentTime;
  }

  changed(name) {
    if (this.silent) return;
    if (name === "error") this.onState("This browser cannot play the media file.");
    if (name === "ended" && this.span) { // the media ends before the clip, whose last frame lasts an interval
      this.seek(this.span[0]);
      this.play();
    }
    this.playing = !this.media.paused && !this.media.ended;
    this.onState();
    if (name === "seeked" && !(this.byFrame && this.video)) this.onTime(this.media.currentTime, false);
  }

  waitForFrame() {
    this.media.requestVideoFrameCallback((_, facts) => {
      if (!this.silent) this.onTime(facts.mediaTime, true);
      this.waitForFrame();
    });
  }

  tick(now) {
    if (this.playing && this.silent) {
      this.now = Math.min(this.end, this.now + ((now - this.last) / 1000) * this.rate);
      this.onTime(this.now, false);
      if (this.now >= this.end && !this.span) this.pause();
    } else if (this.playing && !(this.byFrame && this.video)) this.onTime(this.media.currentTime, false);
    if (this.playing && this.span && (this.time >= this.span[1] || this.time < this.span[0] - 0.5)) this.seek(this.span[0]);
    this.last = now;
    requestAnimationFrame((next) => this.tick(next));
  }

  play() {
    if (this.silent) {
      if (this.now >= this.end) this.now = 0;
      this.playing = true;
      this.onState();
    } else this.media.play().catch(() => this.onState());
  }

  pause() {
    if (this.silent) {
      this.playing = false;
      this.onState();
    } else this.media.pause();
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  seek(t) {
    const to = vaflow.clamp(t, 0, this.end);
    if (this.silent) {
      this.now = to;
      this.onTime(to, false);
    } else this.media.currentTime = to;
  }

  setRate(rate) {
    this.rate = rate;
    this.media.playbackRate = this.media.defaultPlaybackRate = rate;
  }
};
