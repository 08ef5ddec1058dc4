// Caches the page itself, so that it opens at once and without a network. Answers, pictures and anything else from the
// API never pass through here: requests that are not for the page's files are left to the browser.

const CACHE = "edge-runtime-page-VERSION"; // the server puts a digest of all files here
const SHELL = [
  "./",
  "static/answering.js",
  "static/api.js",
  "static/app.js",
  "static/attachments.js",
  "static/camera.js",
  "static/chats.js",
  "static/composer.js",
  "static/dom.js",
  "static/grounding.js",
  "static/icon.svg",
  "static/icon-180.png",
  "static/icon-192.png",
  "static/icon-512.png",
  "static/manifest.webmanifest",
  "static/markdown.js",
  "static/prefs.js",
  "static/settings.js",
  "static/speech.js",
  "static/store.js",
  "static/style.css",
  "static/theme.js",
  "static/turns.js",
].map((path) => new URL(path, self.registration.scope).href);

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
  const { method, url } = event.request;
  if (method !== "GET" || !SHELL.includes(url.split(/[?#]/)[0])) return;
  // The server first: it is this machine or one nearby, and its files are never stale.
  event.respondWith(fetch(event.request).catch(() => caches.match(url.split(/[?#]/)[0], { cacheName: CACHE, ignoreVary: true })));
});
