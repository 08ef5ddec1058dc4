// Caches the page itself, so that it opens at once and without a network. Answers, pictures and anything else from the
// API never pass through here: requests that are not for the page's files are left to the browser.

const CACHE = "edge-runtime-page-VERSION"; // the server puts a digest of all files here
const absolute = (path) => new URL(path, self.registration.scope).href;
const SHELL = [
  "./",
  "static/answering.js",
  "static/api.js",
  "static/app.js",
  "static/attachments.js",
  "static/camera.js",
  "static/chats.js",
  "static/composer.js",
  "static/documents.js",
  "static/dom.js",
  "static/export.js",
  "static/grounding.js",
  "static/icon-180.png",
  "static/icon-192.png",
  "static/icon-512.png",
  "static/icon.svg",
  "static/language.js",
  "static/manifest.webmanifest",
  "static/markdown.js",
  "static/model_page.js",
  "static/models.js",
  "static/notice.js",
  "static/options.js",
  "static/prefs.js",
  "static/reach.js",
  "static/settings.js",
  "static/side.js",
  "static/speech.js",
  "static/store.js",
  "static/style.css",
  "static/theme.js",
  "static/tree.js",
  "static/turns.js",
].map(absolute);
// Fetched when they are first needed, and kept from then on.
const LATER = [
  "static/highlight.js",
  "static/math.js",
  "static/texts.js",
  "static/vendor/temml/Temml.woff2",
  "static/vendor/temml/temml.css",
  "static/vendor/temml/temml.js",
].map(absolute);

self.addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(CACHE)
      // The root answers "Ollama is running" to requests that do not accept HTML.
      .then((cache) => cache.addAll(SHELL.map((url) => new Request(url, { cache: "reload", headers: { Accept: "text/html,*/*" } }))))
      .then(() => self.skipWaiting()),
  );
});

self.addEventListener("activate", (event) => {
  const forget = (names) => Promise.all(names.filter((name) => name !== CACHE).map((name) => caches.delete(name)));
  event.waitUntil(caches.keys().then(forget).then(() => self.clients.claim()));
});

self.addEventListener("fetch", (event) => {
  const address = event.request.url.split(/[?#]/)[0];
  if (event.request.method !== "GET" || !(SHELL.includes(address) || LATER.includes(address))) return;
  // The server first: it is this machine or one nearby, and its files are never stale.
  event.respondWith(fromServer(event.request, address).catch(() => caches.match(address, { cacheName: CACHE, ignoreVary: true })));
});

async function fromServer(request, address) {
  const response = await fetch(request);
  if (response.ok && LATER.includes(address)) await (await caches.open(CACHE)).put(address, response.clone());
  return response;
}
