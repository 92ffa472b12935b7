// Runs before the first paint, so that a chosen theme does not flash in after the other one.
{
  let theme = null;
  try {
    theme = localStorage.getItem("moonbase.theme");
  } catch {
    // Storage may be forbidden; the system's choice holds then.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
