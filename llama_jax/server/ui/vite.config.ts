import { defineConfig } from "vite";

// Names without hashes: the server sends an ETag with each file, and git shows what has changed.
export default defineConfig({
  base: "./",
  build: {
    target: "es2022",
    assetsInlineLimit: 0,
    cssCodeSplit: false,
    modulePreload: { polyfill: false },
    rolldownOptions: {
      output: {
        entryFileNames: "ui/app.js",
        chunkFileNames: "ui/[name].js",
        assetFileNames: "ui/app[extname]",
      },
    },
  },
});
