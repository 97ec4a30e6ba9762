// What follows is compiled for the instruction sets that TARGET names, whatever the compiler was called with.
#if defined(__clang__)
#define TARGET_PRAGMA_(x) _Pragma(#x)
#define TARGET_PRAGMA(x) TARGET_PRAGMA_(clang attribute push(__attribute__((target(x))), apply_to = function))
#else
#define TARGET_PRAGMA_(x) _Pragma(#x)
#define TARGET_PRAGMA(x) _Pragma("GCC push_options") TARGET_PRAGMA_(GCC target x)
#endif
#if defined(__clang__)
TARGET_PRAGMA(TARGET)
#else
TARGET_PRAGMA((TARGET))
#endif
