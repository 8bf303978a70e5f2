"""Several questions at once, which together take little more time than one. The token is read from .env."""

import asyncio

import replicate
from dotenv import load_dotenv

MODEL = "tu-usuario/nombre-modelo"
QUESTIONS = [
    "Dime un producto de limpieza que blanquee la ropa",
    "Dime una fruta amarilla",
    "What do bees make?",
    "What is the capital of France?",
]


async def ask(version, question):
    asked = {"pregunta": question, "max_tokens": 32, "temperature": 0}
    answer = await replicate.async_run(version, input=asked, wait=False)
    return "".join([chunk async for chunk in answer])


async def main():
    model = await replicate.models.async_get(MODEL)
    answers = await asyncio.gather(*(ask(model.latest_version, question) for question in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question}\n{answer}\n")


load_dotenv()
asyncio.run(main())
