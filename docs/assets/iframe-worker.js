// A page that was opened as a file may start no worker from another file, and so it could not search. There a hidden
// frame takes the worker's place: it runs the same script, and messages go to and fro as between page and worker.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      this.ready = new Promise(ready => {
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = frame.contentDocument.createElement("script")
        script.src = new URL(url, location)
        script.onload = () => ready(inside)
        frame.contentDocument.body.append(script)
      })
    }

    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }

    terminate() {}
  }
