"""Owns the usual small service: FastAPI around gpt4all, one answer at a time."""

import os

from fastapi import FastAPI
from gpt4all import GPT4All
from pydantic import BaseModel


class Question(BaseModel):
    prompt: str
    max_tokens: int = 200


app = FastAPI()
model = GPT4All(os.environ["MODEL"], model_path=".", allow_download=False, device="cpu")


@app.post("/generate")
def generate(question: Question) -> dict[str, str]:
    return {"response": model.generate(question.prompt, max_tokens=question.max_tokens)}
