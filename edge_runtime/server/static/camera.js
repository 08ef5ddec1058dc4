// A picture from the camera: the phone's own camera app if there is one, otherwise a dialog with the live picture.

import { byId } from "./dom.js";
import { t } from "./language.js";

/** Take a picture; resolves with a File, or null when the user cancels. */
export async function takePicture() {
  const dialog = byId("camera");
  const video = dialog.querySelector("video");
  const trouble = dialog.querySelector(".trouble");
  const shoot = byId("shoot");
  shoot.disabled = true;
  trouble.textContent = "";
  dialog.returnValue = "";
  dialog.showModal();
  let stream = null;
  const closed = new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
    video.srcObject = stream;
    await video.play();
    shoot.disabled = false;
  } catch (error) {
    trouble.textContent = error.name === "NotAllowedError" ? t("The browser was not allowed to use the camera.") : t("No camera was found.");
  }
  await closed;
  const file = dialog.returnValue === "shoot" && stream ? await frameOf(video) : null;
  for (const track of stream?.getTracks() ?? []) track.stop();
  video.srcObject = null;
  return file;
}

/** Whether a dialog with a live picture is possible: browsers give only secure pages access to cameras. */
export const hasCamera = () => Boolean(navigator.mediaDevices?.getUserMedia);

async function frameOf(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
  return new File([blob], "camera.jpg", { type: "image/jpeg" });
}
