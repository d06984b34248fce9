// What the library shows to Python.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))
