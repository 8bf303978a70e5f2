// A question, and its answer as it grows: npm ci, then node --env-file=../../.env stream.js
import Replicate from "replicate";

const [owner, name] = ["tu-usuario", "nombre-modelo"];

const replicate = new Replicate();
const { latest_version: version } = await replicate.models.get(owner, name);
const events = replicate.stream(`${owner}/${name}:${version.id}`, {
  input: { pregunta: "Dime un producto de limpieza que blanquee la ropa", temperature: 0 },
});
for await (const event of events) {
  // an event that is no text is an empty one
  process.stdout.write(String(event));
}
console.log();
