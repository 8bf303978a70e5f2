// A question, and its answer once it is whole: npm ci, then node --env-file=../../.env answer.js
import Replicate from "replicate";

const [owner, name] = ["tu-usuario", "nombre-modelo"];

const replicate = new Replicate();
const { latest_version: version } = await replicate.models.get(owner, name);
const output = await replicate.run(`${owner}/${name}:${version.id}`, {
  input: { pregunta: "Dime un producto de limpieza que blanquee la ropa", temperature: 0 },
  // until its end: otherwise the client returns after 60 seconds with what there is by then
  wait: { mode: "poll" },
});
console.log(output.join(""));
